package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Owners knows which snapshotters use which images of the node, and gives up an
// image when the last one is through with it. Several snapshotters share it.
//
// It is a directory for each image with a file "by-<snapshotter>" for each that
// uses it, written before the node is asked for the image and removed after
// the snapshotter's last record of it. A file "kept" says that the image was on
// the node before us, so that it stays. A directory without "by-" is a leftover:
// the image is to be given up.
type Owners struct {
	dir    string
	images Images
	log    *slog.Logger
	step   func(string)

	mu   sync.Mutex
	uses map[use]int // protected by mu
}

// use is one snapshotter's use of one image.
type use struct {
	name     string
	manifest digest.Digest
}

const (
	byPrefix   = "by-"
	keptMark   = "kept"
	tempPrefix = "tmp-"
)

// OpenOwners opens the directory, which it makes when it is not there.
func OpenOwners(dir string, images Images, log *slog.Logger) (*Owners, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, err
	}
	o := &Owners{dir: dir, images: images, log: log, step: func(string) {}, uses: map[use]int{}}
	temps, err := filepath.Glob(filepath.Join(dir, tempPrefix+"*"))
	for _, t := range temps {
		err = errors.Join(err, os.RemoveAll(t))
	}
	return o, err
}

// path of an image's directory. Precondition: the digest is valid.
func (o *Owners) path(manifest digest.Digest, name ...string) string {
	return filepath.Join(append([]string{o.dir, manifest.Algorithm().String() + "-" + manifest.Encoded()}, name...)...)
}

// acquire counts one more use, before the node is asked for the image.
func (o *Owners) acquire(ctx context.Context, u use) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.uses[u] == 0 {
		if err := o.mark(ctx, u); err != nil {
			return fmt.Errorf("own image %s: %w", u.manifest, err)
		}
	}
	o.uses[u]++
	return nil
}

// release counts one use less. An image that cannot be given up now stays a
// leftover for collect.
func (o *Owners) release(ctx context.Context, u use) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	if o.uses[u]--; o.uses[u] > 0 {
		return nil
	}
	delete(o.uses, u)
	return o.unmark(ctx, u)
}

// restore sets what a snapshotter uses, by its records, and gives up what it
// does not; what cannot be given up now is left to collect.
func (o *Owners) restore(ctx context.Context, name string, counts map[digest.Digest]int) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	var errs []error
	for m, n := range counts {
		u := use{name, m}
		o.uses[u] = n
		errs = append(errs, o.mark(ctx, u))
	}
	all, err := o.list()
	errs = append(errs, err)
	for _, m := range all {
		if u := (use{name, m}); o.uses[u] == 0 {
			if err := o.unmark(ctx, u); err != nil {
				o.log.Warn("an image that is not used any more stays for now", "manifest", m, "error", err)
			}
		}
	}
	return errors.Join(errs...)
}

// Collect gives up the images that nobody uses.
func (o *Owners) Collect(ctx context.Context) error {
	o.mu.Lock()
	defer o.mu.Unlock()
	all, err := o.list()
	for _, m := range all {
		err = errors.Join(err, o.giveUp(ctx, m))
	}
	return err
}

// Precondition: o.mu is held.
func (o *Owners) mark(ctx context.Context, u use) error {
	err := writeMark(o.path(u.manifest, byPrefix+u.name))
	if !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	has, err := o.images.Has(ctx, u.manifest)
	if err != nil {
		return err
	}
	temp, err := os.MkdirTemp(o.dir, tempPrefix)
	if err != nil {
		return err
	}
	err = writeMark(filepath.Join(temp, byPrefix+u.name))
	if has {
		err = errors.Join(err, writeMark(filepath.Join(temp, keptMark)))
	}
	o.step("marking")
	// All at once, so that no crash makes the image look like ours alone.
	if err == nil {
		err = os.Rename(temp, o.path(u.manifest))
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(temp))
	}
	return nil
}

// Precondition: o.mu is held.
func (o *Owners) unmark(ctx context.Context, u use) error {
	if err := os.Remove(o.path(u.manifest, byPrefix+u.name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	o.step("unmarked")
	return o.giveUp(ctx, u.manifest)
}

// giveUp removes an image that nobody uses any more. One that others use stays
// for the next Collect. Precondition: o.mu is held.
func (o *Owners) giveUp(ctx context.Context, manifest digest.Digest) error {
	if by, err := filepath.Glob(o.path(manifest, byPrefix+"*")); err != nil || len(by) > 0 {
		return err
	}
	if _, err := os.Lstat(o.path(manifest, keptMark)); errors.Is(err, fs.ErrNotExist) {
		err := o.images.Remove(ctx, manifest)
		if errdefs.IsFailedPrecondition(err) {
			o.log.Debug("an image that no snapshot uses stays, because others use it", "manifest", manifest, "error", err)
			return nil
		}
		if err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("give up image %s: %w", manifest, err)
		}
	}
	o.step("given up")
	gone := filepath.Join(o.dir, tempPrefix+"gone-"+manifest.Encoded())
	if err := os.Rename(o.path(manifest), gone); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	o.step("forgotten")
	return os.RemoveAll(gone)
}

// list returns the images that have a directory.
func (o *Owners) list() ([]digest.Digest, error) {
	entries, err := os.ReadDir(o.dir)
	var out []digest.Digest
	for _, e := range entries {
		algorithm, encoded, _ := strings.Cut(e.Name(), "-")
		if d := digest.NewDigestFromEncoded(digest.Algorithm(algorithm), encoded); d.Validate() == nil {
			out = append(out, d)
		}
	}
	return out, err
}

// writeMark makes an empty file.
func writeMark(path string) error {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return f.Close()
}
