package snapshotter

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

const helper = "/opt/tatami/bin/nydus-overlayfs-tatami"

// rig is a snapshotter over images in directories.
type rig struct {
	*Snapshotter
	images *dirImages
	cfg    Config
}

type tree = map[string]string

func newRig(t testing.TB, mode Mode, change ...func(*Config)) *rig {
	t.Helper()
	dir := t.TempDir()
	g := &rig{images: newDirImages(t, filepath.Join(dir, "images"))}
	g.cfg = Config{
		Root: filepath.Join(dir, "root"), Name: "tatami", Mode: mode, Fallback: []Mode{Share, Full},
		MountHelper: helper, Images: g.images, Log: slog.New(slog.NewTextHandler(t.Output(), nil)),
	}
	for _, c := range change {
		c(&g.cfg)
	}
	g.open(t)
	t.Cleanup(func() { g.Close() })
	return g
}

func (g *rig) open(t testing.TB) {
	t.Helper()
	var err error
	if g.Snapshotter, err = Open(t.Context(), g.cfg); err != nil {
		t.Fatal(err)
	}
}

// restart closes and opens the snapshotter.
func (g *rig) restart(t testing.TB) {
	t.Helper()
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	g.open(t)
}

// pulled is an image that containerd was asked to pull.
type pulled struct {
	manifest digest.Digest
	names    []string // of the layers' snapshots, the lowest first
	full     int      // how many layers containerd had to unpack
}

func (p pulled) top() string { return p.names[len(p.names)-1] }

func layerLabels(ref string, manifest digest.Digest, chain string) map[string]string {
	return map[string]string{
		snapshots.LabelSnapshotRef: chain, snapshotters.TargetRefLabel: ref,
		snapshotters.TargetManifestDigestLabel: manifest.String(),
	}
}

// pull does what containerd's unpacker and metadata store do (topHalf in
// core/unpack/unpacker.go, createSnapshot in core/metadata/snapshot.go).
func (g *rig) pull(t testing.TB, namespace, ref string, manifest digest.Digest) pulled {
	t.Helper()
	p, err := g.tryPull(t.Context(), namespace, ref, manifest)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (g *rig) tryPull(ctx context.Context, namespace, ref string, manifest digest.Digest) (p pulled, err error) {
	p.manifest = manifest
	i, err := g.images.image(manifest)
	if err != nil {
		return p, err
	}
	parent := ""
	for n, chain := range chainIDs(i.DiffIDs) {
		key := fmt.Sprintf("%s/%d/extract-%d %s", namespace, n, n, chain)
		opt := snapshots.WithLabels(layerLabels(ref, manifest, chain))
		mounts, err := g.Prepare(ctx, key, parent, opt)
		switch {
		case errdefs.IsAlreadyExists(err):
			if parent, err = g.find(ctx, chain, parent); err != nil {
				return p, err
			}
		case err != nil:
			return p, err
		default:
			p.full++
			name := fmt.Sprintf("%s/%d/%s", namespace, n, chain)
			if err := unpack(ctx, mounts, i.Files[n]); err != nil {
				return p, err
			}
			if err := g.Commit(ctx, name, key, opt); err != nil {
				return p, err
			}
			parent = name
		}
		p.names = append(p.names, parent)
	}
	return p, nil
}

// find is how containerd finds a remote snapshot.
func (g *rig) find(ctx context.Context, chain, parent string) (name string, err error) {
	filter := fmt.Sprintf(`labels.%q==%s,parent==%q`, snapshots.LabelSnapshotRef, chain, parent)
	err = g.Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		if i.Kind == snapshots.KindCommitted {
			name = i.Name
		}
		return nil
	}, filter)
	if err == nil && name == "" {
		err = fmt.Errorf("target snapshot %s on %q in backend: %w", chain, parent, errdefs.ErrNotFound)
	}
	return name, err
}

func unpack(ctx context.Context, mounts []mount.Mount, files tree) error {
	return mount.WithTempMount(ctx, mounts, func(root string) error { return writeTree(root, files) })
}

func writeTree(root string, files tree) error {
	for name, content := range files {
		path := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			return err
		}
		if err := os.WriteFile(path, []byte(content), 0o644); err != nil {
			return err
		}
	}
	return nil
}

// dirs lists the snapshots' directories.
func (g *rig) dirs(t testing.TB) []string {
	t.Helper()
	return list(t, filepath.Join(g.cfg.Root, "snapshots"))
}

func list(t testing.TB, dir string) (names []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		names = append(names, e.Name())
	}
	return names
}

func (g *rig) holders(t testing.TB) []string {
	t.Helper()
	return list(t, filepath.Join(g.images.root, "holders"))
}

func (g *rig) preparedImages(t testing.TB) []string {
	t.Helper()
	return list(t, filepath.Join(g.images.root, "prepared"))
}

// entry returns what List says of a snapshot.
func (g *rig) entry(t testing.TB, key string) Entry {
	t.Helper()
	all, err := g.List(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range all {
		if e.Key == key {
			return e
		}
	}
	t.Fatalf("no snapshot %q among %+v", key, all)
	return Entry{}
}

// must is for tests that go on only with a value.
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// needRoot skips tests that mount.
func needRoot(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root, to mount overlays")
	}
}

// text shows a mount list with the rig's directories as $ROOT and $IMAGES.
func (g *rig) text(mounts []mount.Mount) string {
	var b strings.Builder
	for _, m := range mounts {
		fmt.Fprintf(&b, "%s %s\n", m.Type, m.Source)
		for _, o := range m.Options {
			fmt.Fprintf(&b, "\t%s\n", o)
		}
	}
	return strings.NewReplacer(g.cfg.Root, "$ROOT", g.images.root, "$IMAGES").Replace(b.String())
}
