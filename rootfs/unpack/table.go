package unpack

import (
	"context"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/keyed"
)

// Spec is an image to unpack and where to mount it.
type Spec struct {
	ID        string // of the mount
	Reference string // for messages and lists
	Source    string // where the layers come from, for lists
	Manifest  digest.Digest
	Layers    []ocispec.Descriptor // the lowest first
	DiffIDs   []digest.Digest      // of Layers; nil checks none
	Blobs     Blobs
	Target    string // made when missing
	Upper     string // directory for the writable layer; the tmpfs when empty
	ReadOnly  bool   // no writable layer
}

// Record is a mount that exists.
type Record struct {
	ID, Reference string
	Source        string // see Spec
	Manifest      digest.Digest
	Target        string
	Upper         string // "" when read-only
	ReadOnly      bool
	Size          int64 // of the files of all layers in bytes
}

// Table holds unpacked images and their mounts. What it knows lies in its
// directory, so that the next process goes on with it:
//
//	images/<manifest>/0, 1, …   layers; the directory appears when it is complete
//	mounts/<id in hex>/record.json, upper, work
//
// Lock order: the key of an image in images, then mu.
type Table struct {
	dir string
	log *slog.Logger

	images keyed.Mutex // by manifest: unpacking and removing

	mu      sync.Mutex
	records map[string]Record // protected by mu
}

// Open takes over dir, on which a tmpfs is mounted unless one is there.
func Open(dir string, log *slog.Logger) (*Table, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	t := &Table{dir: dir, log: log, records: make(map[string]Record)}
	if err := t.mountTmpfs(); err != nil {
		return nil, err
	}
	for _, d := range []string{t.imagesDir(), t.mountsDir()} {
		if err := os.MkdirAll(d, 0o700); err != nil {
			return nil, err
		}
	}
	return t, t.load()
}

func (t *Table) imagesDir() string { return filepath.Join(t.dir, "images") }
func (t *Table) mountsDir() string { return filepath.Join(t.dir, "mounts") }

func (t *Table) imageDir(m digest.Digest) string { return filepath.Join(t.imagesDir(), m.Encoded()) }

// mountDir is named in hex because ids may have any form.
func (t *Table) mountDir(id string) string {
	return filepath.Join(t.mountsDir(), hex.EncodeToString([]byte(id)))
}

func (t *Table) mountTmpfs() error {
	if err := os.MkdirAll(t.dir, 0o700); err != nil {
		return err
	}
	if isMountPoint(t.dir) {
		return nil
	}
	// No limit: half of the memory, which is the default, is the first thing
	// that users of guest pull run into.
	if err := unix.Mount("tatami-unpack", t.dir, "tmpfs", 0, "mode=0700,size=0,nr_inodes=0"); err != nil {
		return fmt.Errorf("mount a tmpfs on %s: %w", t.dir, err)
	}
	return nil
}

// load reads the records and removes what an earlier process left unfinished.
func (t *Table) load() error {
	mounts, err := os.ReadDir(t.mountsDir())
	if err != nil {
		return err
	}
	for _, m := range mounts {
		b, err := os.ReadFile(filepath.Join(t.mountsDir(), m.Name(), "record.json"))
		var r Record
		if err == nil {
			err = json.Unmarshal(b, &r)
		}
		if err != nil {
			t.log.Warn("record of a mount dropped", "name", m.Name(), "error", err)
			continue
		}
		t.records[r.ID] = r
	}
	images, err := os.ReadDir(t.imagesDir())
	if err != nil {
		return err
	}
	for _, i := range images {
		if strings.HasPrefix(i.Name(), partPrefix) {
			err = errors.Join(err, os.RemoveAll(filepath.Join(t.imagesDir(), i.Name())))
		}
	}
	return err
}

// partPrefix marks an image that is being unpacked.
const partPrefix = ".part-"

// sizeFile has the size of an image's files in bytes, beside its layers.
const sizeFile = "size"

// Mount unpacks the image unless that was done before, and mounts it. The same
// id with the same image and target again does nothing; with another it is
// ErrAlreadyExists.
func (t *Table) Mount(ctx context.Context, s Spec) (Record, error) {
	if err := s.Manifest.Validate(); err != nil {
		return Record{}, fmt.Errorf("mount %s: manifest digest %q: %w: %w", s.ID, s.Manifest, err, errdefs.ErrInvalidArgument)
	}
	unlock, err := t.images.Lock(ctx, s.Manifest.String())
	if err != nil {
		return Record{}, err
	}
	defer unlock()
	if r, ok := t.Get(s.ID); ok {
		if r.Manifest != s.Manifest || r.Target != s.Target {
			return Record{}, fmt.Errorf("%s is mounted at %s already: unmount it first: %w", s.ID, r.Target, errdefs.ErrAlreadyExists)
		}
		return r, nil
	}
	if err := s.validate(); err != nil {
		return Record{}, fmt.Errorf("mount %s: %w", s.ID, err)
	}
	if err := t.unpack(ctx, s); err != nil {
		return Record{}, errors.Join(err, t.removeUnused(s.Manifest))
	}
	r, err := t.mount(s)
	if err != nil {
		return Record{}, errors.Join(err, t.drop(s.ID, s.Target), t.removeUnused(s.Manifest))
	}
	return r, nil
}

func (s Spec) validate() error {
	if !filepath.IsAbs(s.Target) || s.Upper != "" && !filepath.IsAbs(s.Upper) {
		return fmt.Errorf("target %q and upper directory %q must be absolute: %w", s.Target, s.Upper, errdefs.ErrInvalidArgument)
	}
	if s.ReadOnly && s.Upper != "" {
		return fmt.Errorf("a read-only mount has no upper directory: %w", errdefs.ErrInvalidArgument)
	}
	if isMountPoint(s.Target) {
		return fmt.Errorf("target %s is a mount point already: unmount it or choose another: %w", s.Target, errdefs.ErrAlreadyExists)
	}
	return nil
}

func (t *Table) unpack(ctx context.Context, s Spec) error {
	done := t.imageDir(s.Manifest)
	if _, err := os.Stat(done); err == nil {
		return nil
	}
	part := filepath.Join(t.imagesDir(), partPrefix+s.Manifest.Encoded())
	if err := os.RemoveAll(part); err != nil {
		return err
	}
	if err := os.Mkdir(part, 0o755); err != nil { //nolint:gosec // below a directory of mode 0700
		return err
	}
	size, err := Image(ctx, part, s.Layers, s.DiffIDs, s.Blobs)
	if err == nil {
		err = os.WriteFile(filepath.Join(part, sizeFile), strconv.AppendInt(nil, size, 10), 0o600)
	}
	if err != nil {
		return errors.Join(err, os.RemoveAll(part))
	}
	return os.Rename(part, done)
}

func (t *Table) mount(s Spec) (Record, error) {
	dir := t.mountDir(s.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return Record{}, err
	}
	r := Record{ID: s.ID, Reference: s.Reference, Source: s.Source, Manifest: s.Manifest, Target: s.Target, ReadOnly: s.ReadOnly}
	if !s.ReadOnly {
		if r.Upper = s.Upper; r.Upper == "" {
			r.Upper = dir
		}
	}
	size, err := os.ReadFile(filepath.Join(t.imageDir(s.Manifest), sizeFile))
	if err != nil {
		return Record{}, err
	}
	if r.Size, err = strconv.ParseInt(string(size), 10, 64); err != nil {
		return Record{}, err
	}
	// The record comes first: a mount without one would stay for ever.
	b, err := json.Marshal(r)
	if err != nil {
		return Record{}, err
	}
	if err := os.WriteFile(filepath.Join(dir, "record.json"), b, 0o600); err != nil {
		return Record{}, err
	}
	if err := Overlay(t.imageDir(s.Manifest), len(s.Layers), r.Upper, s.Target); err != nil {
		return Record{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	t.records[s.ID] = r
	return r, nil
}

// Get returns the record of a mount.
func (t *Table) Get(id string) (Record, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	r, ok := t.records[id]
	return r, ok
}

// List returns all records, sorted by id.
func (t *Table) List() []Record {
	t.mu.Lock()
	defer t.mu.Unlock()
	var all []Record
	for _, id := range slices.Sorted(maps.Keys(t.records)) {
		all = append(all, t.records[id])
	}
	return all
}

// Unmount undoes Mount. An unknown id is ErrNotFound.
func (t *Table) Unmount(ctx context.Context, id string) error {
	return t.unmount(ctx, id, func(Record) bool { return true })
}

// unmount undoes a mount if that is still due when nobody else works on its
// image.
func (t *Table) unmount(ctx context.Context, id string, due func(Record) bool) error {
	r, ok := t.Get(id)
	if !ok {
		return notFound(id)
	}
	unlock, err := t.images.Lock(ctx, r.Manifest.String())
	if err != nil {
		return err
	}
	defer unlock()
	now, ok := t.Get(id)
	if !ok || now.Manifest != r.Manifest {
		return notFound(id)
	}
	if !due(now) {
		return nil
	}
	if err := t.drop(id, now.Target); err != nil {
		return err
	}
	return t.removeUnused(now.Manifest)
}

func notFound(id string) error {
	return fmt.Errorf("unmount %s: no such mount: %w", id, errdefs.ErrNotFound)
}

// drop undoes mount, also when that came half way.
func (t *Table) drop(id, target string) error {
	if isMountPoint(target) {
		if err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return fmt.Errorf("unmount %s: %w", target, err)
		}
	}
	t.mu.Lock()
	delete(t.records, id)
	t.mu.Unlock()
	return os.RemoveAll(t.mountDir(id))
}

// removeUnused removes an unpacked image without mounts.
// Precondition: the image's key is locked.
func (t *Table) removeUnused(m digest.Digest) error {
	for _, r := range t.List() {
		if r.Manifest == m {
			return nil
		}
	}
	return os.RemoveAll(t.imageDir(m))
}

// Sweep forgets mounts whose target was unmounted by somebody else, as
// kata-agent does when a container is removed. One that was made again
// meanwhile stays.
func (t *Table) Sweep(ctx context.Context) error {
	var errs []error
	gone := func(r Record) bool { return !isMountPoint(r.Target) }
	for _, r := range t.List() {
		if !gone(r) {
			continue
		}
		if err := t.unmount(ctx, r.ID, gone); !errdefs.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Remove unmounts everything below dir, which an earlier Open made.
func Remove(ctx context.Context, dir string) error {
	if !isMountPoint(dir) {
		return nil
	}
	t, err := Open(dir, nil)
	if err != nil {
		return err
	}
	var errs []error
	for _, r := range t.List() {
		errs = append(errs, t.Unmount(ctx, r.ID))
	}
	return errors.Join(errors.Join(errs...), unix.Unmount(dir, unix.MNT_DETACH))
}
