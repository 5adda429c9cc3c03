package snapshotter

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// dirImages serves images out of directories: one a layer. What is mounted is a
// directory with the layers one over the other, without whiteouts. Like the
// node, it keeps everything on disk, so that a process may be killed.
//
//	catalog/<manifest>.json   an image that can be had
//	prepared/<manifest>       one that is there
//	merged/<manifest>-<n>     its lowest n layers
//	holders/<holder>          who holds
type dirImages struct {
	root     string
	asked    atomic.Int32                // calls of Prepare
	before   func(context.Context) error // at the begin of Prepare
	mountErr error
	fileErr  error
}

type dirImage struct {
	DiffIDs []digest.Digest
	Files   []map[string]string // by layer: path and content
	Lazy    string              // why it cannot be served lazily; "" when it can
	TOC     bool                // its diffIDs are not verified
}

func newDirImages(t testing.TB, root string) *dirImages {
	t.Helper()
	d := &dirImages{root: root, before: func(context.Context) error { return nil }}
	for _, sub := range []string{"catalog", "prepared", "merged", "holders"} {
		if err := os.MkdirAll(filepath.Join(root, sub), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

// publish makes an image whose layers have the given files. Layers with the same
// files are the same layer.
func (d *dirImages) publish(t testing.TB, lazy string, layers ...map[string]string) (manifest digest.Digest) {
	t.Helper()
	return d.add(t, dirImage{Files: layers, Lazy: lazy})
}

// publishTOC makes an image whose diffIDs cannot be verified.
func (d *dirImages) publishTOC(t testing.TB, layers ...map[string]string) digest.Digest {
	t.Helper()
	return d.add(t, dirImage{Files: layers, TOC: true})
}

func (d *dirImages) add(t testing.TB, i dirImage) (manifest digest.Digest) {
	t.Helper()
	for _, l := range i.Files {
		text, err := json.Marshal(l)
		if err != nil {
			t.Fatal(err)
		}
		i.DiffIDs = append(i.DiffIDs, digest.FromBytes(text))
	}
	text, err := json.Marshal(i)
	if err != nil {
		t.Fatal(err)
	}
	manifest = digest.FromBytes(text)
	if err := os.WriteFile(filepath.Join(d.root, "catalog", manifest.Encoded()), text, 0o600); err != nil {
		t.Fatal(err)
	}
	return manifest
}

func (d *dirImages) image(manifest digest.Digest) (i dirImage, err error) {
	text, err := os.ReadFile(filepath.Join(d.root, "catalog", manifest.Encoded()))
	if err != nil {
		return i, fmt.Errorf("no such image: %w: %w", err, errdefs.ErrNotFound)
	}
	return i, json.Unmarshal(text, &i)
}

func (d *dirImages) prepared(manifest digest.Digest) string {
	return filepath.Join(d.root, "prepared", manifest.Encoded())
}

func (d *dirImages) Has(_ context.Context, manifest digest.Digest) (bool, error) {
	_, err := os.Stat(d.prepared(manifest))
	if errors.Is(err, os.ErrNotExist) {
		return false, nil
	}
	return err == nil, err
}

func (d *dirImages) Prepare(ctx context.Context, _ string, manifest digest.Digest) ([]digest.Digest, error) {
	d.asked.Add(1)
	if err := d.before(ctx); err != nil {
		return nil, err
	}
	i, err := d.image(manifest)
	if err != nil {
		return nil, err
	}
	if i.Lazy != "" {
		return nil, fmt.Errorf("%s: %w", i.Lazy, errdefs.ErrNotImplemented)
	}
	return i.DiffIDs, os.WriteFile(d.prepared(manifest), nil, 0o600)
}

func (d *dirImages) Verified(_ context.Context, manifest digest.Digest) (bool, error) {
	i, err := d.image(manifest)
	return err == nil && !i.TOC, err
}

func (d *dirImages) Mount(ctx context.Context, holder string, c Chain) (string, error) {
	if d.mountErr != nil {
		return "", d.mountErr
	}
	if err := d.hold(ctx, holder, c); err != nil {
		return "", err
	}
	dir := filepath.Join(d.root, "merged", fmt.Sprintf("%s-%d", c.Manifest.Encoded(), c.Layers))
	i, err := d.image(c.Manifest)
	for _, l := range i.Files[:c.Layers] {
		for name, content := range l {
			path := filepath.Join(dir, name)
			err = errors.Join(err, os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, []byte(content), 0o644))
		}
	}
	return dir, err
}

func (d *dirImages) Look(_ context.Context, dir string, files ...string) (Tree, error) {
	st, err := os.Stat(dir)
	if err != nil {
		return Tree{}, err
	}
	t := Tree{Mode: st.Mode(), Files: map[string][]byte{}}
	if sys, ok := st.Sys().(*syscall.Stat_t); ok {
		t.UID, t.GID = int(sys.Uid), int(sys.Gid)
	}
	for _, name := range files {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err == nil {
			t.Files[name] = b
		}
	}
	return t, nil
}

func (d *dirImages) File(ctx context.Context, holder string, c Chain) (string, error) {
	if d.fileErr != nil {
		return "", d.fileErr
	}
	path := filepath.Join(d.root, "merged", fmt.Sprintf("%s-%d.erofs", c.Manifest.Encoded(), c.Layers))
	return path, errors.Join(d.hold(ctx, holder, c), os.WriteFile(path, nil, 0o600))
}

func (d *dirImages) hold(ctx context.Context, holder string, c Chain) error {
	if has, err := d.Has(ctx, c.Manifest); err != nil || !has {
		return fmt.Errorf("image %s is not prepared: %w", c.Manifest, errors.Join(err, errdefs.ErrNotFound))
	}
	return os.WriteFile(filepath.Join(d.root, "holders", holder), []byte(c.Manifest), 0o600)
}

func (d *dirImages) Release(_ context.Context, holder string) error {
	if err := os.Remove(filepath.Join(d.root, "holders", holder)); !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return nil
}

func (d *dirImages) Holders(context.Context) (out []string, err error) {
	entries, err := os.ReadDir(filepath.Join(d.root, "holders"))
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out, err
}

func (d *dirImages) Usage(_ context.Context, c Chain) (n int64, err error) {
	i, err := d.image(c.Manifest)
	if err != nil {
		return 0, err
	}
	for _, content := range i.Files[c.Layers-1] {
		n += int64(len(content))
	}
	return n, nil
}

func (d *dirImages) Remove(_ context.Context, manifest digest.Digest) error {
	holders, err := d.Holders(context.Background())
	for _, h := range holders {
		if m, _ := os.ReadFile(filepath.Join(d.root, "holders", h)); digest.Digest(m) == manifest {
			return fmt.Errorf("%s holds it: %w", h, errdefs.ErrFailedPrecondition)
		}
	}
	if err != nil {
		return err
	}
	if err := os.Remove(d.prepared(manifest)); errors.Is(err, os.ErrNotExist) {
		return errdefs.ErrNotFound
	} else if err != nil {
		return err
	}
	return nil
}

var _ Images = (*dirImages)(nil)
