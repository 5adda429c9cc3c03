package credentials

import (
	"testing"

	"oras.land/oras-go/v2/registry/remote/auth"
)

// TestMatches has the examples of the kubelet's documentation ("Configure a
// kubelet image credential provider") and of pkg/credentialprovider/Keyring.go.
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
		if got := Matches(tc.pattern, tc.repository); got != tc.want {
			t.Errorf("%q and %q: %v", tc.pattern, tc.repository, got)
		}
	}
}

func TestFind(t *testing.T) {
	k := Keyring{}
	for _, p := range []string{"quay.io", "quay.io/coreos", "*.io", "https://index.docker.io/v1/", "r.example:5000"} {
		k[p] = auth.Credential{Username: p}
	}
	for repository, want := range map[string]string{
		"quay.io/coreos/etcd": "quay.io/coreos", "quay.io/x": "quay.io", "gcr.io/x": "*.io",
		"docker.io/library/x": "https://index.docker.io/v1/", "r.example:5000/x": "r.example:5000", "r.example/x": "",
	} {
		if got := k.Find(repository).Username; got != want {
			t.Errorf("%s: %q, want %q", repository, got, want)
		}
	}
}

func FuzzMatches(f *testing.F) {
	f.Add("*.azurecr.io", "my.azurecr.io/a")
	f.Add("https://[::1]:5000/v2/a", "[::1]:5000/a/b")
	f.Add("[a-", "a/b")
	f.Fuzz(func(t *testing.T, pattern, repository string) {
		if Matches(pattern, repository) {
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
			k.Find("docker.io/library/x")
			c.helper("docker.io")
		}
	})
}
