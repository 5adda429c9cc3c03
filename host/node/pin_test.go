package node

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/image"
)

func TestMatch(t *testing.T) {
	sum := digest.FromString("x").String()
	for _, tc := range []struct {
		pattern, ref string
		want         bool
	}{
		{"registry.k8s.io/pause:*", "registry.k8s.io/pause:3.10", true},
		{"registry.k8s.io/pause:*", "registry.k8s.io/pause@" + sum, true},
		{"registry.k8s.io/pause:3.*", "registry.k8s.io/pause:3.10", true},
		{"registry.k8s.io/pause:3.*", "registry.k8s.io/pause:2.1", false},
		{"registry.k8s.io/pause:3.*", "registry.k8s.io/pause@" + sum, false},
		{"registry.k8s.io/pause", "registry.k8s.io/pause:3.10", true},
		{"registry.k8s.io/pause", "registry.k8s.io/pause2:3.10", false},
		{"registry.k8s.io/*", "registry.k8s.io/pause:3.10", true},
		{"registry.k8s.io/*", "registry.k8s.io/a/pause:3.10", false},
		{"*.example.com/*/*", "eu.example.com/a/b:1", true},
		{"busybox", "busybox:1.36", true},
		{"busybox:1.36", "docker.io/library/busybox:1.36", true},
		{"team/app", "docker.io/team/app:1", true},
		{"localhost:5000/app:1", "localhost:5000/app:1", true},
		{"localhost:5000/app", "localhost:5000/app:2", true},
		{"127.0.0.1:5000/*/app:v*", "127.0.0.1:5000/library/app:v7", true},
		{"busybox@" + sum, "busybox@" + sum, true},
		{"busybox@" + sum, "busybox:1", false},
		{"busybox[", "busybox:1", false},
		{"", "busybox:1", false},
	} {
		ref, err := image.ParseReference(tc.ref)
		if err != nil {
			t.Fatal(err)
		}
		if got := Match(tc.pattern, ref); got != tc.want {
			t.Errorf("%q matches %s: %v", tc.pattern, tc.ref, got)
		}
	}
}

func FuzzMatch(f *testing.F) {
	f.Add("registry.k8s.io/pause:*")
	f.Add("a@sha256:00")
	f.Add(":@/[")
	ref, err := image.ParseReference("registry.k8s.io/pause:3.10")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, pattern string) {
		if Match(pattern, ref) && CheckPattern(pattern) != nil && !strings.ContainsAny(pattern, " \t\r\n") {
			t.Errorf("%q matches and is refused", pattern)
		}
	})
}

// What is pinned stays while others make way, also after a restart and when it was
// pinned before it was there; what is unpinned goes.
func TestPin(t *testing.T) {
	g := newRig(t)
	g.quota, g.pinned = 8<<20, []string{g.reg.Host() + "/library/settings"}
	g.restart(t)
	var kept tree
	names := []string{"settings:1", "pinned:1", "other:1", "other:2", "other:3"}
	for i, name := range names {
		files := tree{"data": text(byte(i), 1<<20)}
		if i == 1 {
			kept = files
		}
		g.push(name, files.gzip(t))
	}
	if err := g.Pin(g.ref("pinned:*")); err != nil {
		t.Fatal(err)
	}
	g.restart(t)
	usage := func(name string) int64 {
		t.Helper()
		n, err := g.LayerUsage(g.ref(name), g.prepare(t, name).Manifest, 0)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	for _, name := range names {
		g.prepare(t, name)
	}
	settle(t, g, func() bool { return g.Space().Used <= g.Space().High })
	if got := g.Space(); got.Quota != g.quota/8*7 || got.High != got.Quota/100*50 || got.Pinned < 2<<20 || got.Evicted == 0 {
		t.Errorf("%+v", got)
	}
	for _, name := range names[:2] {
		if n := usage(name); n < 1<<20 {
			t.Errorf("%s has %d bytes", name, n)
		}
	}
	if n := usage("other:1") + usage("other:2") + usage("other:3"); n >= 3<<20 {
		t.Errorf("the others have %d bytes", n)
	}
	if got := g.Pinned(); !slices.Equal(got, []string{g.pinned[0], g.ref("pinned:*")}) {
		t.Errorf("pinned: %q", got)
	}
	if err := g.Unpin(g.pinned[0]); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("unpin what the settings pin: %v", err)
	}
	if err := g.Unpin(g.ref("pinned:1")); !errdefs.IsNotFound(err) {
		t.Errorf("unpin what is not pinned: %v", err)
	}
	if err := g.Unpin(g.ref("pinned:*")); err != nil {
		t.Fatal(err)
	}
	g.quota = 1 << 20
	g.restart(t)
	settle(t, g, func() bool { return usage("pinned:1") == 0 })
	if n := usage("settings:1"); n < 1<<20 {
		t.Errorf("what the settings pin has %d bytes", n)
	}
	l := g.lease(t, "pinned:1") // it is on the node still, and fetched again
	g.check(t, l, 0, kept)
}

func settle(t *testing.T, g *rig, done func() bool) {
	t.Helper()
	for began := time.Now(); !done(); time.Sleep(5 * time.Millisecond) {
		if time.Since(began) > 30*time.Second {
			t.Fatalf("nothing happens: %+v", g.Space())
		}
	}
}

func TestPinRefuses(t *testing.T) {
	g := newRig(t)
	for _, bad := range []string{"", "a b", "a[", "a:[", "busybox@sha256:1", strings.Repeat("a", maxPattern+1)} {
		if err := g.Pin(bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("pin %.20q: %v", bad, err)
		}
	}
	for i := range maxPins {
		g.pinned = append(g.pinned, fmt.Sprint("a", i))
	}
	g.Node.pinned = g.pinned
	if err := g.Pin("one-more"); !errdefs.IsResourceExhausted(err) {
		t.Errorf("pin: %v", err)
	}
	if err := g.Pin("a7"); err != nil {
		t.Errorf("pin again: %v", err)
	}
	g.pinned = nil
	if err := os.WriteFile(g.pinnedPath(), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	g.restart(t)
	if got := g.Pinned(); len(got) > 0 || !strings.Contains(g.log.String(), "pin it again") {
		t.Errorf("after the file was damaged: %q, log %s", got, g.log)
	}
}

// Compressed blobs have a part of the quota, and not what is beside it.
func TestBounds(t *testing.T) {
	for _, tc := range []struct{ quota, blobs, store, kept int64 }{
		{0, 100, 0, 100}, {8000, 100, 7900, 100}, {8000, 10_000, 7000, 1000}, {8000, 0, 8000, 0},
	} {
		n := &Node{cfg: Config{Root: t.TempDir(), Blobs: tc.blobs, Quota: func(int64) (int64, error) { return tc.quota, nil }, High: 95, Low: 85}}
		b, err := n.bounds()
		if err != nil || b.quota != tc.store || b.blobs != tc.kept || b.high != tc.store/100*95 || b.low != tc.store/100*85 {
			t.Errorf("%+v: %+v, %v", tc, b, err)
		}
	}
}
