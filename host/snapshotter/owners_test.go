package snapshotter

import (
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"
)

// pair are two snapshotters of one node.
func pair(t *testing.T) (a, b *rig) {
	t.Helper()
	dir := t.TempDir()
	images := newDirImages(t, filepath.Join(dir, "images"))
	rigs := [2]*rig{}
	owners := must(OpenOwners(filepath.Join(dir, "owners"), images, slog.New(slog.DiscardHandler)))(t)
	for i, name := range []string{"one", "two"} {
		rigs[i] = &rig{images: images, cfg: Config{
			Root: filepath.Join(dir, name), Name: name, Mode: Share, Fallback: []Mode{Full}, Images: images, Owners: owners}}
		rigs[i].open(t)
		t.Cleanup(func() { rigs[i].Close() })
	}
	return rigs[0], rigs[1]
}

// An image stays as long as one of the snapshotters has a record of it.
func TestOwnersShared(t *testing.T) {
	a, b := pair(t)
	manifest := a.images.publish(t, "", tree{"a": "1"}, tree{"b": "2"})
	p, q := a.pull(t, "k8s.io", ref, manifest), b.pull(t, "k8s.io", ref, manifest)
	for _, name := range reversed(p.names) {
		if err := a.Remove(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := a.preparedImages(t); !slices.Equal(got, []string{manifest.Encoded()}) {
		t.Errorf("images %v", got)
	}
	for _, name := range reversed(q.names) {
		if err := b.Remove(t.Context(), name); err != nil {
			t.Fatal(err)
		}
	}
	if got := a.preparedImages(t); len(got) != 0 {
		t.Errorf("images %v", got)
	}
	if got := list(t, a.cfg.Owners.dir); len(got) != 0 {
		t.Errorf("owned %v", got)
	}
}

// An image that was on the node before stays.
func TestOwnersForeign(t *testing.T) {
	g := newRig(t, Share)
	manifest := g.images.publish(t, "", tree{"a": "1"})
	if _, err := g.images.Prepare(t.Context(), ref, manifest); err != nil {
		t.Fatal(err)
	}
	p := g.pull(t, "k8s.io", ref, manifest)
	g.restart(t)
	if err := g.Remove(t.Context(), p.top()); err != nil {
		t.Fatal(err)
	}
	if got := g.preparedImages(t); !slices.Equal(got, []string{manifest.Encoded()}) {
		t.Errorf("images %v", got)
	}
	if got := list(t, g.owners.dir); len(got) != 0 {
		t.Errorf("owned %v", got)
	}
}

// An image that somebody uses when we are through goes at a later Cleanup.
func TestOwnersBusy(t *testing.T) {
	g := newRig(t, Share)
	manifest := g.images.publish(t, "", tree{"a": "1"})
	p := g.pull(t, "k8s.io", ref, manifest)
	if _, err := g.images.Mount(t.Context(), "run", Chain{Manifest: manifest, Layers: 1, Of: 1}); err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(t.Context(), p.top()); err != nil {
		t.Fatal(err)
	}
	g.restart(t)
	if got := g.preparedImages(t); len(got) != 1 {
		t.Errorf("images %v", got)
	}
	if got := g.holders(t); !slices.Equal(got, []string{"run"}) {
		t.Errorf("holders %v: others' are not ours to release", got)
	}
	if err := g.images.Release(t.Context(), "run"); err != nil {
		t.Fatal(err)
	}
	if err := g.Cleanup(t.Context()); err != nil {
		t.Fatal(err)
	}
	g.checkEmpty(t)
}

// A snapshotter that is no longer configured keeps its images.
func TestOwnersUnopened(t *testing.T) {
	a, b := pair(t)
	manifest := a.images.publish(t, "", tree{"a": "1"})
	a.pull(t, "k8s.io", ref, manifest)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	b.cfg.Owners = must(OpenOwners(b.cfg.Owners.dir, b.images, slog.New(slog.DiscardHandler)))(t)
	b.restart(t)
	if got := b.preparedImages(t); !slices.Equal(got, []string{manifest.Encoded()}) {
		t.Errorf("images %v", got)
	}
}

// Other files in the directory are nobody's image.
func TestOwnersList(t *testing.T) {
	g := newRig(t, Share)
	for _, name := range []string{"x", "sha256-..", "sha256-", "md5-00"} {
		if err := writeMark(filepath.Join(g.owners.dir, name)); err != nil {
			t.Fatal(err)
		}
	}
	if got, err := g.owners.list(); err != nil || len(got) != 0 {
		t.Errorf("%v, %v", got, err)
	}
	if got, want := g.owners.path(digest.FromString("x"), "a"), filepath.Join(g.owners.dir, "sha256-"+digest.FromString("x").Encoded(), "a"); got != want {
		t.Errorf("%s, want %s", got, want)
	}
}

// A leftover that cannot be removed is no reason not to start: running containers
// need the process.
func TestStartsWithLeftovers(t *testing.T) {
	g := newRig(t, Share)
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}))
	left := g.images.publish(t, "", tree{"b": "2"})
	for _, stuck := range []string{filepath.Join(g.images.root, "holders", "tatami.left"), g.images.prepared(left)} {
		if err := os.MkdirAll(filepath.Join(stuck, "busy"), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	mark := g.owners.path(left, byPrefix+g.cfg.Name)
	if err := errors.Join(os.Mkdir(filepath.Dir(mark), 0o700), writeMark(mark)); err != nil {
		t.Fatal(err)
	}
	g.restart(t)
	if _, err := g.Prepare(t.Context(), "c", p.top()); err != nil {
		t.Error(err)
	}
	for _, stuck := range []string{filepath.Join(g.images.root, "holders", "tatami.left"), g.images.prepared(left)} {
		if err := os.RemoveAll(filepath.Join(stuck, "busy")); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.Cleanup(t.Context()); err != nil {
		t.Error(err)
	}
	if got := g.preparedImages(t); len(got) != 1 {
		t.Errorf("images %v", got)
	}
}
