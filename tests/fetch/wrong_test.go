package fetch

import (
	"testing"

	"github.com/tatami-containers/tatami/host/node"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// everywhere are offsets of wrong bytes all over a blob.
func everywhere(size int) (at []int64) {
	for off := 1000; off < size; off += 20_000 {
		at = append(at, int64(off))
	}
	return at
}

// TestWrongBytes has a node read layers through a mirror, or from a registry, that
// gives wrong bytes: the reader gets the right ones.
func TestWrongBytes(t *testing.T) {
	for _, tc := range []struct {
		name   string
		make   func(plain []byte) registrytest.Layer
		mirror bool
		count  int // of answers that are wrong; 0: all
		early  bool
	}{
		{"gzip, a mirror", func(p []byte) registrytest.Layer { return registrytest.Must(registrytest.Gzip(p)) }, true, 0, true},
		{"eStargz, a mirror", func(p []byte) registrytest.Layer { return registrytest.Must(registrytest.EStargz(p)) }, true, 0, false},
		{"eStargz, the registry once", func(p []byte) registrytest.Layer { return registrytest.Must(registrytest.EStargz(p)) }, false, 1, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			origin, mirror := registrytest.Start(t, registrytest.Options{}), registrytest.Start(t, registrytest.Options{})
			l := tc.make(files(6, 100_000, 9))
			img := origin.PushImage("library/x", "v1", registrytest.Image{Layers: []registrytest.Layer{l}})
			mirror.PushImage("library/x", "v1", registrytest.Image{Layers: []registrytest.Layer{l}})
			hosts := []*registry.Host{{Name: origin.Host(), Scheme: "http", Path: "/v2", Capabilities: registry.CanAll}}
			wrong := origin
			if tc.mirror {
				hosts = append([]*registry.Host{{Name: mirror.Host(), Scheme: "http", Path: "/v2", Capabilities: registry.CanPull}}, hosts...)
				wrong = mirror
			}
			c := registry.New(registry.Config{Hedge: -1, Hosts: func(string) []*registry.Host { return hosts }})
			defer func() { _ = c.Close() }() // never fails
			n, err := node.Open(node.Config{Root: t.TempDir(), Registry: c})
			if err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := n.Close(); err != nil {
					t.Error(err)
				}
			}()
			spoil := func() {
				wrong.Fault(img.Layers[0].Digest.String(), tc.count, registrytest.Corrupt(everywhere(len(l.Blob))...))
			}
			ref := origin.Host() + "/library/x:v1"
			if tc.early {
				spoil()
			}
			if _, err := n.Prepare(t.Context(), ref, ""); err != nil {
				t.Fatal(err)
			}
			if !tc.early {
				spoil()
			}
			readAll(t, n, ref)
			found := false
			for _, h := range c.Stats().Hosts {
				if h.Host == wrong.Host() {
					found = h.Wrong == 1
				}
			}
			if !found {
				t.Errorf("counted %+v", c.Stats().Hosts)
			}
		})
	}
}
