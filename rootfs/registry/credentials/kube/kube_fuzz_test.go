package kube

import (
	"context"
	"encoding/json"
	"log/slog"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/rootfs/registry/credentials"
)

// FuzzKubeconfig reads files that may be one. No program of theirs is run.
func FuzzKubeconfig(f *testing.F) {
	f.Add([]byte("kind: Config\ncurrent-context: a\ncontexts: [{name: a, context: {cluster: b, user: c, namespace: n}}]\n" +
		"clusters: [{name: b, cluster: {server: 'https://x', certificate-authority-data: YQ==}}]\nusers: [{name: c, user: {token: t, tokenFile: f}}]\n"))
	f.Add([]byte(`{"kind": "Config", "users": [{"user": {"exec": {"command": "x"}}}]}`))
	f.Add([]byte("kind: Config\nclusters: 5"))
	f.Add([]byte("a: &a [*a, *a]\nkind: Config"))
	f.Fuzz(func(t *testing.T, data []byte) {
		k, err := parseKubeconfig(data)
		if k == nil || err != nil {
			return
		}
		for i := range k.Users {
			k.Users[i].User.Exec = nil
		}
		if s, err := k.connect(t.Context(), "/nonexistent"); err == nil && (s.base.Scheme != "https" || s.base.Host == "") {
			t.Errorf("secrets are asked for at %s", s.base)
		}
	})
}

// FuzzEvent takes what a watch may bring.
func FuzzEvent(f *testing.F) {
	f.Add([]byte(`{"type": "ADDED", "object": {"metadata": {"namespace": "a", "name": "b", "resourceVersion": "5"}, "data": {".dockerconfigjson": "e30="}}}`))
	f.Add([]byte(`{"type": "MODIFIED", "object": {"metadata": {"resourceVersion": "5"}, "data": {".dockercfg": "eyJ4IjogeyJhdXRoIjogInkifX0="}}}`))
	f.Add([]byte(`{"type": "ERROR", "object": {"code": 410}}`))
	f.Add([]byte(`{"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": "7"}}}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		var e event
		if json.Unmarshal(data, &e) != nil {
			return
		}
		c := &cluster{log: slog.New(slog.DiscardHandler), known: []map[string]credentials.Keyring{{}, {}}}
		for i := range secretTypes {
			version, err := c.apply(i, e)
			if (err == nil) != (version != "") {
				t.Errorf("version %q, error %v", version, err)
			}
		}
		c.tried.Choose(context.Background(), "r.example/x", c.find("r.example/x"))
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
