package node

import (
	"bytes"
	"context"
	"errors"
	"io"
	"io/fs"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/erofs/go-erofs"
	"github.com/opencontainers/go-digest"
)

// files lists what an image file holds, by an EROFS reader that is not ours.
func filesOf(t *testing.T, f *File) []string {
	t.Helper()
	data := make([]byte, f.Size())
	if _, err := f.ReadAt(t.Context(), data, 0); err != nil && !errors.Is(err, io.EOF) {
		t.Fatal(err)
	}
	fsys, err := erofs.Open(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	err = fs.WalkDir(fsys, ".", func(path string, e fs.DirEntry, err error) error {
		if err == nil && !e.IsDir() {
			all = append(all, path)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return all
}

// A prefix is the image of the lower layers, beside the whole one, and leaves
// the store when it is closed.
func TestPrefix(t *testing.T) {
	g := newRig(t)
	base, app := tree{"etc/motd": "hello", "etc/name": "base"}, tree{"etc/name": "app", "etc/app": "x", "etc/.wh.motd": ""}
	g.push("app:v1", base.gzip(t), app.gzip(t))
	p := g.prepare(t, "app:v1")
	for count, want := range map[int][]string{1: {"etc/motd", "etc/name"}, 2: {"etc/app", "etc/name"}} {
		l, err := g.LeaseManifest(t.Context(), g.ref("app:v1"), p.Manifest)
		if err != nil {
			t.Fatal(err)
		}
		f, err := l.Prefix(t.Context(), count)
		if err != nil {
			t.Fatal(err)
		}
		if got := filesOf(t, f); !slices.Equal(got, want) {
			t.Errorf("%d layers have %v, want %v", count, got, want)
		}
		if err := g.Remove(p.Manifest); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("the image of an open prefix is removed: %v", err)
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
	}
	if kept := g.store.Images(); len(kept) != 1 {
		t.Errorf("the store has %v", kept)
	}
	for _, count := range []int{-1, 0, 3} {
		l := g.lease(t, "app:v1")
		if _, err := l.Prefix(t.Context(), count); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%d layers: %v", count, err)
		}
	}
	if err := g.Remove(p.Manifest); err != nil {
		t.Error(err)
	}
}

// What a manifest is called does not matter once it is known; a tag that has
// moved on does not change what is prepared.
func TestPrepareManifest(t *testing.T) {
	g := newRig(t)
	first := g.push("app:v1", tree{"a": "1"}.gzip(t)).Desc.Digest
	second := g.push("app:v1", tree{"a": "2"}.gzip(t)).Desc.Digest
	prepared := map[digest.Digest]bool{}
	for _, want := range []digest.Digest{first, second, first} {
		p, err := g.PrepareManifest(t.Context(), g.ref("app:v1"), want)
		if err != nil || p.Manifest != want {
			t.Fatalf("prepared %v (%v), want %s", p, err, want)
		}
		prepared[want] = true
		if n := g.Stats().Images; n != len(prepared) {
			t.Errorf("%d images, asked for %d: the one that the tag means is nobody's", n, len(prepared))
		}
		if ids, err := p.DiffIDs(); err != nil || len(ids) != 1 {
			t.Errorf("diffIDs %v: %v", ids, err)
		}
	}
	if _, err := g.PrepareManifest(t.Context(), g.ref("app:v1"), digest.FromString("another")); !errdefs.IsNotFound(err) {
		t.Errorf("a manifest that the registry does not have: %v", err)
	}
	if g.Has(digest.FromString("another")) || !g.Has(second) {
		t.Error("Has is wrong")
	}
}

// What the node has made an index of itself is verified.
func TestVerified(t *testing.T) {
	g := newRig(t)
	g.push("built:v1", tree{"a": "1"}.gzip(t))
	g.push("toc:v1", tree{"a": "1"}.gzip(t), tree{"b": "2"}.estargz(t))
	for name, want := range map[string]bool{"built:v1": true, "toc:v1": false} {
		if got, err := g.Verified(g.prepare(t, name).Manifest); err != nil || got != want {
			t.Errorf("%s: %v %v", name, got, err)
		}
	}
	if _, err := g.Verified(digest.FromString("another")); !errdefs.IsNotFound(err) {
		t.Errorf("an image that is not there: %v", err)
	}
}

// Usage follows what is kept, and counts a layer that stands twice once.
func TestLayerUsage(t *testing.T) {
	g := newRig(t)
	data := tree{"data": text(1, 1<<20)}
	lazy := data.estargz(t)
	g.push("app:v1", lazy, tree{"b": "b"}.gzip(t), lazy)
	p := g.prepare(t, "app:v1")
	usage := func(layer int) int64 {
		n, err := g.LayerUsage(g.ref("app:v1"), p.Manifest, layer)
		if err != nil {
			t.Fatal(err)
		}
		return n
	}
	before := usage(0)
	l := g.lease(t, "app:v1")
	if err := l.open.Fill(context.WithoutCancel(t.Context())); err != nil {
		t.Fatal(err)
	}
	if after := usage(0); before >= 1<<20 || after < 1<<20 {
		t.Errorf("usage %d, and %d when all was read", before, after)
	}
	if d, w := usage(0)+usage(1), g.store.Space().Used; d != w {
		t.Errorf("layers have %d bytes, the store %d", d, w)
	}
	if n := usage(2); n != 0 {
		t.Errorf("a layer that stands twice counts twice: %d", n)
	}
	if _, err := g.LayerUsage(g.ref("app:v1"), p.Manifest, 3); !errdefs.IsInvalidArgument(err) {
		t.Errorf("layer 3: %v", err)
	}
}
