package credentials

import (
	"testing"
	"time"

	"oras.land/oras-go/v2/registry/remote/auth"
)

// TestMatches has the examples of the kubelet's documentation ("Configure a
// kubelet image credential provider") and of pkg/credentialprovider/keyring.go.
func TestMatches(t *testing.T) {
	for _, tc := range []struct {
		pattern, repository string
		want                bool
	}{
		{"123456789.dkr.ecr.us-east-1.amazonaws.com", "123456789.dkr.ecr.us-east-1.amazonaws.com/app", true},
		{"*.dkr.ecr.*.amazonaws.com", "123456789.dkr.ecr.us-east-1.amazonaws.com/app", true},
		{"*.azurecr.io", "my.azurecr.io/a/b", true},
		{"*.azurecr.io", "azurecr.io/a", false},
		{"*.io", "my.azurecr.io/a", false},
		{"gcr.io", "gcr.io/project/x", true},
		{"gcr.io", "eu.gcr.io/project/x", false},
		{"*.*.registry.io", "a.b.registry.io/x", true},
		{"app*.k8s.io", "app1.k8s.io/x", true},
		{"k8s.*", "k8s.io/x", true},
		{"registry.io:8080/path", "registry.io:8080/path/x", true},
		{"registry.io:8080/path", "registry.io:8080/other", false},
		{"registry.io:8080/path", "registry.io/path", false},
		{"registry.io", "registry.io:8080/x", false},
		{"https://registry.io/v2/", "registry.io/x", true},
		{"http://registry.io/v1/team", "registry.io/team/x", true},
		{"[2001:db8::1]:5000", "[2001:db8::1]:5000/x", true},
		{"", "registry.io/x", false},
		{"[", "registry.io/x", false},
		{"a b%", "registry.io/x", false},
		{"*", "localhost/x", true},
	} {
		if got := matches(tc.pattern, tc.repository); got != tc.want {
			t.Errorf("%q and %q: %v", tc.pattern, tc.repository, got)
		}
	}
}

func TestFind(t *testing.T) {
	k := keyring{}
	for _, p := range []string{"quay.io", "quay.io/coreos", "*.io", "https://index.docker.io/v1/", "r.example:5000"} {
		k[p] = auth.Credential{Username: p}
	}
	for repository, want := range map[string]string{
		"quay.io/coreos/etcd": "quay.io/coreos", "quay.io/x": "quay.io", "gcr.io/x": "*.io",
		"docker.io/library/x": "https://index.docker.io/v1/", "r.example:5000/x": "r.example:5000", "r.example/x": "",
	} {
		if got := k.find(repository).Username; got != want {
			t.Errorf("%s: %q, want %q", repository, got, want)
		}
	}
}

func FuzzMatches(f *testing.F) {
	f.Add("*.azurecr.io", "my.azurecr.io/a")
	f.Add("https://[::1]:5000/v2/a", "[::1]:5000/a/b")
	f.Add("[a-", "a/b")
	f.Fuzz(func(t *testing.T, pattern, repository string) {
		if matches(pattern, repository) {
			if _, ok := split(repository); !ok {
				t.Errorf("%q matches %q", pattern, repository)
			}
		}
	})
}

func FuzzSecret(f *testing.F) {
	f.Add([]byte(`{"auths":{"a":{"auth":"dTpw"},"b/c":{"username":"u","password":"p","identitytoken":"t"}}}`))
	f.Add([]byte(`{"auths":{"a":null}}`))
	f.Add([]byte(`{"auths":[]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, k, err := parseDocker(data)
		if err == nil {
			k.find("docker.io/library/x")
			c.helper("docker.io")
		}
	})
}

func FuzzAnswer(f *testing.F) {
	f.Add([]byte(`{"kind":"CredentialProviderResponse","apiVersion":"v","cacheKeyType":"Image","cacheDuration":"1h","auth":{"*.io":{"username":"u","password":"p"}}}`))
	f.Add([]byte(`{"kind":"CredentialProviderResponse","apiVersion":"v","cacheKeyType":"Global","cacheDuration":null,"auth":null}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		p := &plugin{apiVersion: "v", life: time.Hour}
		now := time.Now()
		_, a, err := p.decode(data, "gcr.io/x", now)
		if err == nil && !a.expires.IsZero() && !a.expires.After(now) {
			t.Errorf("an answer that ends at once is kept: %s", data)
		}
	})
}

func FuzzProviders(f *testing.F) {
	f.Add([]byte("kind: CredentialProviderConfig\napiVersion: kubelet.config.k8s.io/v1\nproviders:\n- name: x\n  matchImages: ['*.io']\n  defaultCacheDuration: 1h\n  apiVersion: credentialprovider.kubelet.k8s.io/v1\n"))
	f.Add([]byte(`{"auths":{}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		c, err := parseProviders(data)
		if c == nil || err != nil {
			return
		}
		for _, p := range c.Providers {
			_, _ = p.plugin("/bin") // must not panic
		}
	})
}
