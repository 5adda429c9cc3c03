package node

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// After a restart everything is still there; bytes that were lost come from the
// registry again, in ranges, through the checkpoints.
func TestRestart(t *testing.T) {
	g := newRig(t)
	plain, toc := tree{"bin/a": text(1, 3<<20), "etc/b": text(2, 9000)}, tree{"c": text(3, 2<<20)}
	pushed := g.push("app:v1", plain.gzip(t), toc.estargz(t))
	before := g.prepare(t, "app:v1")
	g.restart(t)
	g.reg.Reset()
	g.check(t, g.lease(t, "app:v1"), 0, plain)
	if n := g.layerBytes(pushed); n != 0 {
		t.Errorf("a restart cost %d bytes", n)
	}
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	g.loseSegments(t)
	g.open(t)
	after := g.prepare(t, "app:v1")
	if after.Index != "node" || after.Manifest != before.Manifest || after.ImageSize != before.ImageSize {
		t.Errorf("after the restart: %+v", after)
	}
	l := g.lease(t, "app:v1")
	g.check(t, l, 0, tree{"etc/b": plain["etc/b"]})
	sent := g.reg.BlobStats(pushed.Layers[0].Digest)
	if sent.Bytes == 0 || sent.Bytes > pushed.Layers[0].Size*4/5 {
		t.Errorf("a small file cost %+v of %d bytes", sent, pushed.Layers[0].Size)
	}
	g.check(t, l, 0, plain)
	g.check(t, l, 1, toc)
}

// With its registry down, an image whose bytes were lost gives errors, and what
// is there can still be read.
func TestRegistryDown(t *testing.T) {
	g := newRig(t)
	kept, lost := tree{"kept": text(1, 1<<20)}, tree{"lost": text(2, 1<<20)}
	g.push("kept:v1", kept.gzip(t))
	g.push("lost:v1", lost.estargz(t))
	g.prepare(t, "kept:v1")
	g.prepare(t, "lost:v1")
	k, l := g.lease(t, "kept:v1"), g.lease(t, "lost:v1")
	g.reg.Close()
	g.check(t, k, 0, kept)
	if err := g.read(t.Context(), l, 0, lost); !errdefs.IsUnavailable(err) {
		t.Errorf("lost bytes: %v", err)
	}
}

// A tag is resolved every time. When that is not possible, it means what it
// meant last; a digest needs no registry.
func TestTags(t *testing.T) {
	g := newRig(t)
	first := g.push("app:v1", tree{"a": "1"}.gzip(t))
	g.prepare(t, "app:v1")
	second := g.push("app:v1", tree{"a": "2"}.gzip(t))
	if p := g.prepare(t, "app:v1"); p.Manifest != second.Desc.Digest || p.Index != "built" {
		t.Fatalf("the tag moved, prepared %+v", p)
	}
	pinned := "app@" + first.Desc.Digest.String()
	if p := g.prepare(t, pinned); p.Index != "node" {
		t.Errorf("a digest that is known: %+v", p)
	}
	g.patience = 50 * time.Millisecond
	for name, effect := range map[string]registrytest.Effect{
		"error": registrytest.Status(503), "limit": registrytest.Status(429), "silence": registrytest.Delay(registrytest.Forever),
	} {
		end := g.reg.Fault("/manifests/", 0, effect)
		if p := g.prepare(t, "app:v1"); p.Manifest != second.Desc.Digest {
			t.Errorf("%s: prepared %+v", name, p)
		}
		end()
	}
	if !strings.Contains(g.log.String(), "level=WARN msg=\"the registry cannot be reached") {
		t.Error("nothing was logged")
	}
	g.patience = 10 * time.Second // after refusals requests are not sent as they come
	// Who may not pull any more gets nothing from what the node kept.
	end := g.reg.Fault("/manifests/", 0, registrytest.Status(403))
	if _, err := g.Prepare(t.Context(), g.ref("app:v1"), ""); !errdefs.IsPermissionDenied(err) {
		t.Errorf("forbidden: %v", err)
	}
	end()
	g.reg.Close()
	if p := g.prepare(t, pinned); p.Manifest != first.Desc.Digest {
		t.Errorf("a digest without its registry: %+v", p)
	}
	if _, err := g.Prepare(t.Context(), g.ref("app:v2"), ""); !errdefs.IsUnavailable(err) {
		t.Errorf("an unknown tag without its registry: %v", err)
	}
}

func TestRemove(t *testing.T) {
	g := newRig(t)
	shared := tree{"lib": text(1, 200_000)}
	layer := shared.gzip(t)
	g.push("a:v1", layer, tree{"a": text(2, 200_000)}.gzip(t))
	g.push("b:v1", layer)
	a, b := g.prepare(t, "a:v1"), g.prepare(t, "b:v1")
	l := g.lease(t, "a:v1")
	if err := g.Remove(a.Manifest); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "sandbox") {
		t.Fatalf("in use: %v", err)
	}
	l.Close()
	l.Close() // idempotent
	if err := g.Remove(a.Manifest); err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(a.Manifest); !errdefs.IsNotFound(err) {
		t.Errorf("twice: %v", err)
	}
	if n := len(g.list(t, "layers")); n != 1 {
		t.Errorf("%d layer indexes, the shared one is wanted", n)
	}
	if _, err := g.Lease(t.Context(), g.ref("a:v1"), ""); !errdefs.IsNotFound(err) {
		t.Errorf("lease: %v", err)
	}
	g.reg.Reset()
	lb := g.lease(t, "b:v1")
	g.check(t, lb, 0, shared)
	lb.Close()
	if err := g.Remove(b.Manifest); err != nil {
		t.Fatal(err)
	}
	g.nothingKept(t)
	for _, dir := range []string{"layers", "store/segments"} {
		if left := g.list(t, dir); len(left) > 0 {
			t.Errorf("%s has %v", dir, left)
		}
	}
	g.prepare(t, "a:v1") // as if for the first time
	g.check(t, g.lease(t, "a:v1"), 0, shared)
}

// What a crash can leave on disk is cleaned up at the next start.
func TestRecover(t *testing.T) {
	g := newRig(t)
	files := tree{"a": text(1, 100_000)}
	p := g.push("app:v1", files.gzip(t))
	g.push("other:v1", tree{"b": "b"}.gzip(t))
	g.prepare(t, "app:v1")
	g.prepare(t, "other:v1")
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	// The record of one image is damaged, the store has lost the other, and
	// there is a layer of an image that was never finished.
	other := filepath.Join(g.root, "images", "sha256")
	entries, err := os.ReadDir(other)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.Name() != p.Desc.Digest.Encoded() {
			err = errors.Join(err, os.WriteFile(filepath.Join(other, e.Name(), recordFile), []byte("{"), 0o600))
		}
	}
	err = errors.Join(err, os.RemoveAll(filepath.Join(g.root, "store", "images")))
	err = errors.Join(err, os.WriteFile(filepath.Join(g.root, "layers", "sha256", digest.FromString("x").Encoded()), nil, 0o600))
	err = errors.Join(err, os.WriteFile(filepath.Join(g.root, "images", "stray"), nil, 0o600))
	err = errors.Join(err, os.WriteFile(filepath.Join(g.root, "refs", "stray.json"), []byte("{"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	g.open(t)
	if n := g.Stats().Images; n != 1 {
		t.Errorf("%d images", n)
	}
	if n := len(g.list(t, "layers")); n != 1 {
		t.Errorf("%d layer indexes", n)
	}
	if n := len(g.list(t, "refs")); n != 1 {
		t.Errorf("%d references", n)
	}
	g.check(t, g.lease(t, "app:v1"), 0, files)
	g.prepare(t, "other:v1")
	g.restart(t)
	if n := g.Stats().Images; n != 2 {
		t.Errorf("%d images after another restart", n)
	}
	g.lease(t, "other:v1")
}

func TestProgress(t *testing.T) {
	g := newRig(t)
	pushed := g.push("app:v1", tree{"a": text(1, 1<<20)}.gzip(t), tree{"b": text(1, 1<<20)}.estargz(t))
	progress := func() Progress {
		p, err := g.Progress(g.ref("app:v1"))
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	if p := progress(); p.Phase != "" {
		t.Errorf("before: %+v", p)
	}
	resolve := g.reg.Fault("/manifests/", 1, registrytest.Delay(100*time.Millisecond))
	blob := pushed.Layers[0].Digest.String()
	end := g.reg.Fault(blob, 1, registrytest.Stall(200_000, 200*time.Millisecond))
	done := make(chan error, 1)
	go func() {
		_, err := g.Prepare(t.Context(), g.ref("app:v1"), "")
		done <- err
	}()
	seen := map[string]bool{}
	partly := false
	for running := true; running; time.Sleep(time.Millisecond) {
		p := progress()
		seen[p.Phase] = true
		if p.Phase == "index" && p.Total > 0 && p.Total != pushed.Layers[0].Size {
			t.Fatalf("total %d, %d are to be fetched", p.Total, pushed.Layers[0].Size)
		}
		partly = partly || p.Done > 0 && p.Done < p.Total
		select {
		case err := <-done:
			if err != nil {
				t.Fatal(err)
			}
			running = false
		default:
		}
	}
	resolve()
	end()
	if !seen["resolve"] || !seen["index"] || !partly {
		t.Errorf("seen %v, partly %v", seen, partly)
	}
	if p := progress(); p.Phase != "ready" || p.Done != p.Total || p.Total == 0 {
		t.Errorf("after: %+v", p)
	}
	if _, err := g.Progress("!"); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no reference: %v", err)
	}
}

// A full disk is an error that says so; with room the same call works.
func TestFullDisk(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: mounts a small tmpfs")
	}
	g := &rig{reg: registrytest.Start(t, registrytest.Options{}), root: t.TempDir()}
	if err := unix.Mount("tmpfs", g.root, "tmpfs", 0, "size=2m"); err != nil {
		t.Skipf("needs to mount a tmpfs: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(g.root, 0); err != nil {
			t.Error(err)
		}
	})
	g.open(t)
	files := tree{"a": text(1, 6<<20)}
	g.push("app:v1", files.gzip(t))
	_, err := g.Prepare(t.Context(), g.ref("app:v1"), "")
	if !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "make room") {
		t.Fatalf("error: %v", err)
	}
	g.nothingKept(t)
	if err := unix.Mount("tmpfs", g.root, "tmpfs", unix.MS_REMOUNT, "size=64m"); err != nil {
		t.Fatal(err)
	}
	g.prepare(t, "app:v1")
	l := g.lease(t, "app:v1")
	g.check(t, l, 0, files)
	l.Close()
}

func TestSecondNode(t *testing.T) {
	g := newRig(t)
	if _, err := Open(Config{Root: g.root}); !errdefs.IsFailedPrecondition(err) {
		t.Fatalf("a second node: %v", err)
	}
}

// A directory in which somebody else keeps things is left alone.
func TestForeignRoot(t *testing.T) {
	for name, path := range map[string]string{"same name": "tmp/precious", "other layout": "layout"} {
		root := t.TempDir()
		file := filepath.Join(root, path)
		if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o700), os.WriteFile(file, []byte("precious"), 0o600)); err != nil {
			t.Fatal(err)
		}
		if _, err := Open(Config{Root: root}); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "directory") {
			t.Errorf("%s: %v", name, err)
		}
		if data, err := os.ReadFile(file); err != nil || string(data) != "precious" {
			t.Errorf("%s: the file is %q, %v", name, data, err)
		}
	}
}

// The cache of what reading layers needs keeps to its bound, but keeps one.
func TestAccessBound(t *testing.T) {
	g := newRig(t)
	var all []layerKey
	for i := range 4 {
		pushed := g.push("app:v1", tree{"a": text(byte(i), 1<<20)}.gzip(t))
		g.prepare(t, "app:v1")
		all = append(all, layerKey{blob: pushed.Layers[0].Digest})
	}
	c := g.access
	for _, limit := range []int64{1, 1 << 30} {
		c.limit = limit
		for _, k := range all {
			l, err := c.get(t.Context(), k)
			if err != nil || l.Entries != nil || len(l.Access.Checkpoints) == 0 {
				t.Fatalf("layer %+v, %v", l, err)
			}
		}
		if want := map[int64]int{1: 1, 1 << 30: len(all)}[limit]; c.order.Len() != want || len(c.byKey) != want || c.bytes == 0 {
			t.Errorf("limit %d: %d kept, %d bytes", limit, c.order.Len(), c.bytes)
		}
	}
	for _, k := range all {
		c.forget(k)
	}
	if c.bytes != 0 || c.order.Len() != 0 {
		t.Errorf("%d bytes, %d elements after forgetting", c.bytes, c.order.Len())
	}
	if _, err := c.get(t.Context(), layerKey{blob: digest.FromString("none")}); !errdefs.IsNotFound(err) {
		t.Errorf("a layer that is not there: %v", err)
	}
}
