package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// An image that is served lazily is only metadata, until a container wants it.
func TestRemote(t *testing.T) {
	g := newRig(t, Guest)
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}, tree{"b": "22"}, tree{"a": "1"}))
	if p.full != 0 || len(g.dirs(t)) != 0 || len(g.holders(t)) != 0 {
		t.Errorf("%d layers unpacked, directories %v, holders %v", p.full, g.dirs(t), g.holders(t))
	}
	want := Chain{Reference: ref, Manifest: p.manifest, Layers: 2, Of: 3}
	if e := g.entry(t, p.names[1]); e.Chain != want || e.Kind != snapshots.KindCommitted {
		t.Errorf("entry %+v", e)
	}
	if u, err := g.Usage(t.Context(), p.names[1]); err != nil || u.Size != 2 {
		t.Errorf("usage %+v, %v", u, err)
	}
	if _, err := g.Mounts(t.Context(), p.top()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("mounts of a layer: %v", err)
	}
	if _, err := g.Prepare(t.Context(), "k8s.io/9/c1", p.top()); err != nil {
		t.Fatal(err)
	}
	if len(g.dirs(t)) != 1 || len(g.holders(t)) != 1 {
		t.Errorf("directories %v, holders %v", g.dirs(t), g.holders(t))
	}
	c, mode, err := g.Lookup(t.Context(), "c1")
	if err != nil || mode != Guest || c != (Chain{Reference: ref, Manifest: p.manifest, Layers: 3, Of: 3}) || !c.Whole() {
		t.Errorf("lookup: %+v, %s, %v", c, mode, err)
	}
	again := g.pull(t, "moby", ref, p.manifest)
	if !slices.Equal(again.names, p.names) {
		t.Errorf("another namespace has %v, want %v", again.names, p.names)
	}
	g.removeAll(t, append([]string{"k8s.io/9/c1"}, reversed(p.names)...)...)
}

func reversed(names []string) []string {
	out := slices.Clone(names)
	slices.Reverse(out)
	return out
}

// removeAll removes all that there is, and checks that nothing stays.
func (g *rig) removeAll(t *testing.T, keys ...string) {
	t.Helper()
	for _, k := range keys {
		if err := g.Remove(t.Context(), k); err != nil {
			t.Errorf("remove %q: %v", k, err)
		}
	}
	g.checkEmpty(t)
}

func (g *rig) checkEmpty(t *testing.T) {
	t.Helper()
	owned := list(t, filepath.Join(g.cfg.Root, "owners"))
	entries := must(g.List(t.Context()))(t)
	if d, h, p := g.dirs(t), g.holders(t), g.preparedImages(t); len(d)+len(h)+len(p)+len(owned)+len(entries) != 0 {
		t.Errorf("left: directories %v, holders %v, images %v, owned %v, records %+v", d, h, p, owned, entries)
	}
}

// What cannot be served lazily is unpacked, and the reason is kept.
func TestFallback(t *testing.T) {
	needRoot(t)
	for _, mode := range []Mode{Guest, Block, Share, Nydus} {
		g := newRig(t, mode)
		p := g.pull(t, "k8s.io", ref, g.images.publish(t, "layer 0 is encrypted", tree{"a": "1"}, tree{"b": "2"}))
		if p.full != 2 {
			t.Errorf("%d layers unpacked", p.full)
		}
		mounts := must(g.Prepare(t.Context(), "c", p.top()))(t)
		for _, key := range []string{p.names[0], p.top(), "c"} {
			if e := g.entry(t, key); e.Mode != Full || !strings.Contains(e.Reason, "layer 0 is encrypted") {
				t.Errorf("%s: entry %+v", mode, e)
			}
		}
		if e := g.entry(t, p.top()); e.Chain.Reference != ref || e.Chain.Manifest != "" {
			t.Errorf("entry %+v", e)
		}
		checkFiles(t, mounted(t, mounts), tree{"a": "1", "b": "2"})
		if _, _, err := g.Lookup(t.Context(), "c"); !errdefs.IsNotFound(err) {
			t.Errorf("lookup: %v", err)
		}
	}
}

func TestNoFallback(t *testing.T) {
	g := newRig(t, Guest, func(c *Config) { c.Fallback = nil })
	_, err := g.tryPull(t.Context(), "k8s.io", ref, g.images.publish(t, "it is encrypted", tree{"a": "1"}))
	if !errdefs.IsNotImplemented(err) || !strings.Contains(err.Error(), "it is encrypted") {
		t.Error(err)
	}
	g.checkEmpty(t)
}

// The node is asked once for an image that it cannot prepare, not once a layer.
func TestRefusedOnce(t *testing.T) {
	g := newRig(t, Share)
	manifest := g.images.publish(t, "it is encrypted", tree{"a": "1"}, tree{"b": "2"}, tree{"c": "3"})
	p := g.pull(t, "k8s.io", ref, manifest)
	if n := g.images.asked.Load(); n != 1 {
		t.Errorf("asked %d times", n)
	}
	if e := g.entry(t, p.top()); !strings.Contains(e.Reason, "it is encrypted") {
		t.Errorf("%+v", e)
	}
}

// Where chain IDs must be verified, an image whose publisher made the table of
// contents is unpacked, and another one stays lazy.
func TestVerifiedChainIDs(t *testing.T) {
	g := newRig(t, Share, func(c *Config) { c.Verified = true })
	built := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}))
	if e := g.entry(t, built.top()); e.Chain.Manifest != built.manifest || e.Reason != "" {
		t.Errorf("%+v", e)
	}
	toc := g.pull(t, "k8s.io", ref, g.images.publishTOC(t, tree{"b": "1"}))
	if e := g.entry(t, toc.top()); e.Chain.Manifest != "" || !strings.Contains(e.Reason, "table of contents by their publisher") {
		t.Errorf("%+v", e)
	}
}

// A container whose mode fails gets the next one.
func TestContainerFallback(t *testing.T) {
	g := newRig(t, Block, func(c *Config) { c.UpperSize = 64 << 20 })
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}))
	g.images.fileErr = errors.New("no room")
	mounts := must(g.Prepare(t.Context(), "c", p.top()))(t)
	if e := g.entry(t, "c"); e.Mode != Share || !strings.Contains(e.Reason, "block: no room") || mounts[0].Type != "overlay" {
		t.Errorf("%+v, %+v", e, mounts)
	}
	if got := list(t, g.path("2")); !slices.Equal(got, []string{usersDir, "fs", "lower", "work"}) {
		t.Errorf("directory has %v", got)
	}
	g.images.mountErr = errors.New("no mounts")
	if _, err := g.Prepare(t.Context(), "d", p.top()); err == nil || !strings.Contains(err.Error(), "no mounts") {
		t.Error(err)
	}
	g.removeAll(t, "c", p.top())
}

// A host that cannot mount images still starts guests, and gives the mount later
// when it can.
func TestGuestWithoutMount(t *testing.T) {
	g := newRig(t, Guest)
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}))
	g.images.mountErr = fmt.Errorf("no EROFS: %w", errdefs.ErrNotImplemented)
	before := must(g.Prepare(t.Context(), "c", p.top()))(t)
	if got := list(t, g.path("2", lowerLink)); len(got) != 0 {
		t.Errorf("lower has %v", got)
	}
	g.images.mountErr = nil
	after := must(g.Mounts(t.Context(), "c"))(t)
	if g.text(before) != g.text(after) {
		t.Errorf("%s, before %s", g.text(after), g.text(before))
	}
	checkFiles(t, g.path("2", lowerLink), tree{"a": "1"})
	g.removeAll(t, "c", p.top())
}

// Two images share a layer that was unpacked for the first: the second, served
// lazily, covers it.
func TestRemoteOnFull(t *testing.T) {
	needRoot(t)
	g := newRig(t, Share)
	base := tree{"base": "b"}
	first := g.pull(t, "k8s.io", "a:1", g.images.publish(t, "not this one", base))
	second := g.images.publish(t, "", base, tree{"top": "t"})
	chain := chainIDs(must(g.images.image(second))(t).DiffIDs)[1]
	opt := snapshots.WithLabels(layerLabels("b:1", second, chain))
	if _, err := g.Prepare(t.Context(), "k8s.io/5/extract-5 "+chain, first.top(), opt); !errdefs.IsAlreadyExists(err) {
		t.Fatal(err)
	}
	name := must(g.find(t.Context(), chain, first.top()))(t)
	if e := g.entry(t, name); e.Chain.Layers != 2 || e.Chain.Manifest != second {
		t.Errorf("%+v", e)
	}
	mounts := must(g.Prepare(t.Context(), "c", name))(t)
	checkFiles(t, mounted(t, mounts), tree{"base": "b", "top": "t"})
	// Another namespace has the whole image lazily: the same chain ID on another parent.
	other := g.pull(t, "moby", "b:1", second)
	if other.full != 0 || other.top() == name || g.entry(t, other.top()).Chain != g.entry(t, name).Chain {
		t.Errorf("%+v beside %s", other, name)
	}
}

// The second of two images with common layers cannot be lazy: its layers are
// unpacked over the first's, which the node mounts.
func TestFullOnRemote(t *testing.T) {
	needRoot(t)
	for _, mode := range []Mode{Guest, Share, Nydus} {
		g := newRig(t, mode)
		base := tree{"base": "b"}
		first := g.pull(t, "k8s.io", "a:1", g.images.publish(t, "", base, tree{"first": "f"}))
		second := g.images.publish(t, "it is encrypted", base, tree{"top": "t"})
		chain := chainIDs(must(g.images.image(second))(t).DiffIDs)[1]
		key, opt := "k8s.io/5/extract-5 "+chain, snapshots.WithLabels(layerLabels("b:1", second, chain))
		mounts := must(g.Prepare(t.Context(), key, first.names[0], opt))(t)
		if err := unpack(t.Context(), mounts, tree{"top": "t"}); err != nil {
			t.Fatal(err)
		}
		if err := g.Commit(t.Context(), "k8s.io/6/"+chain, key, opt); err != nil {
			t.Fatal(err)
		}
		if len(g.holders(t)) != 0 {
			t.Errorf("a layer holds %v", g.holders(t))
		}
		c := must(g.Prepare(t.Context(), "c", "k8s.io/6/"+chain))(t)
		root := mounted(t, c)
		checkFiles(t, root, tree{"base": "b", "top": "t"})
		if got := list(t, root); !slices.Equal(got, []string{"base", "top"}) {
			t.Errorf("container sees %v", got)
		}
		if e := g.entry(t, "c"); e.Mode != Full || !strings.Contains(e.Reason, "encrypted") {
			t.Errorf("entry %+v", e)
		}
	}
}

// The first layers of an image are another image, of which containerd never asks
// us when it has the layers: the chain says so.
func TestPrefix(t *testing.T) {
	g := newRig(t, Guest)
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}, tree{"b": "2"}))
	if _, err := g.Prepare(t.Context(), "k8s.io/9/c1", p.names[0]); err != nil {
		t.Fatal(err)
	}
	c, _, err := g.Lookup(t.Context(), "c1")
	if err != nil || c.Layers != 1 || c.Whole() {
		t.Errorf("%+v, %v", c, err)
	}
}

// The author of a pod sets the labels of a container's snapshot, and that of an
// image those of its layers. Neither makes content look like another image's.
func TestForgedTarget(t *testing.T) {
	needRoot(t)
	g := newRig(t, Share)
	evil := g.images.publish(t, "", tree{"bin/sh": "evil"})
	good := g.images.publish(t, "", tree{"bin/sh": "good"})
	victim := chainIDs(must(g.images.image(good))(t).DiffIDs)[0]
	mounts := must(g.Prepare(t.Context(), "k8s.io/1/pod", "", snapshots.WithLabels(layerLabels("evil:1", evil, victim))))(t)
	if mounts[0].Type != "bind" {
		t.Errorf("%+v", mounts)
	}
	p := g.pull(t, "k8s.io", ref, good)
	if e := g.entry(t, p.top()); e.Chain.Manifest != good {
		t.Errorf("%+v", e)
	}
	if got := g.preparedImages(t); !slices.Equal(got, []string{good.Encoded()}) {
		t.Errorf("images %v", got)
	}
	// Nor does the label of a layer make a container of mode guest an overlay.
	h := newRig(t, Guest)
	q := h.pull(t, "k8s.io", ref, h.images.publish(t, "", tree{"a": "1"}))
	list := must(h.Prepare(t.Context(), "k8s.io/1/pod", q.top(), snapshots.WithLabels(layerLabels("evil:1", evil, "sha256:x"))))(t)
	if list[0].Type != "fuse."+helper {
		t.Errorf("%+v", list)
	}
}

// Containers on layers that were pulled when another mode was set.
func TestModeChanged(t *testing.T) {
	g := newRig(t, Guest)
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}))
	g.cfg.Mode = Full
	g.restart(t)
	if mounts := must(g.Prepare(t.Context(), "c", p.top()))(t); mounts[0].Type != "overlay" || g.entry(t, "c").Mode != Share {
		t.Errorf("%+v, %+v", mounts, g.entry(t, "c"))
	}
	g.removeAll(t, "c", p.top())
}

func TestModeLabel(t *testing.T) {
	g := newRig(t, Guest, func(c *Config) { c.Allow = []Mode{Share} })
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}))
	ask := func(mode string) ([]mount.Mount, error) {
		return g.Prepare(t.Context(), "c-"+mode, p.top(), snapshots.WithLabels(map[string]string{LabelMode: mode}))
	}
	if mounts := must(ask("share"))(t); mounts[0].Type != "overlay" {
		t.Errorf("%+v", mounts)
	}
	for _, mode := range []string{"guest", "block", "full", "", "../../etc", strings.Repeat("x", 5000)} {
		if _, err := ask(mode); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.20q: %v", mode, err)
		}
	}
}

func TestUnnamedImage(t *testing.T) {
	g := newRig(t, Guest)
	key := "k8s.io/1/extract-1 " + digest.FromString("x").String()
	for _, labels := range []map[string]string{
		nil,
		{snapshots.LabelSnapshotRef: "sha256:x"},
		{snapshots.LabelSnapshotRef: "sha256:x", snapshotters.TargetRefLabel: ref, snapshotters.TargetManifestDigestLabel: "sha256:../../x"},
		{snapshots.LabelSnapshotRef: "../../x", snapshotters.TargetRefLabel: ref, snapshotters.TargetManifestDigestLabel: digest.FromString("none").String()},
	} {
		mounts := must(g.Prepare(t.Context(), key, "", snapshots.WithLabels(labels)))(t)
		if e := g.entry(t, key); mounts[0].Type != "bind" || e.Reason == "" {
			t.Errorf("%v: %+v, %+v", labels, mounts, e)
		}
		g.removeAll(t, key)
	}
}

// What a caller gives up leaves nothing.
func TestCancelled(t *testing.T) {
	g := newRig(t, Guest)
	manifest := g.images.publish(t, "", tree{"a": "1"})
	ctx, cancel := context.WithCancel(t.Context())
	g.images.before = func(ctx context.Context) error { cancel(); <-ctx.Done(); return ctx.Err() }
	if _, err := g.tryPull(ctx, "k8s.io", ref, manifest); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	g.checkEmpty(t)
	g.images.before = func(context.Context) error { return nil }
	p := g.pull(t, "k8s.io", ref, manifest)
	ctx, cancel = context.WithCancel(t.Context())
	g.Snapshotter.cfg.step = func(name string) {
		if name == "held" {
			cancel()
		}
	}
	if _, err := g.Prepare(ctx, "c", p.top()); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	g.Snapshotter.cfg.step = func(string) {}
	g.removeAll(t, p.top())
}
