package transport

import (
	"bytes"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/registry"
)

var _ Dest = (*layoutDest)(nil)

// defaultTag is what an image in a layout is called that was given no name.
const defaultTag = "latest"

// layoutDest writes an OCI layout. Blobs appear by rename when they are
// verified, index.json is replaced by rename last. Several programs may write
// one layout at the same time.
type layoutDest struct {
	dir string
	tag string

	// Both are held while index.json is replaced: flock(2) on dir keeps other
	// programs away.
	mu   sync.Mutex
	lock *os.File
}

func newLayoutDest(n Name) (*layoutDest, error) {
	if err := os.MkdirAll(n.Path, 0o755); err != nil { //nolint:gosec // for others to read, as skopeo makes it
		return nil, err
	}
	if err := markLayout(n.Path); err != nil {
		return nil, err
	}
	lock, err := os.Open(n.Path)
	if err != nil {
		return nil, err
	}
	return &layoutDest{dir: n.Path, tag: cmp.Or(n.Object, defaultTag), lock: lock}, nil
}

// markLayout makes an empty directory a layout and accepts one that is.
func markLayout(dir string) error {
	list, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	if len(list) > 0 {
		root, err := os.OpenRoot(dir)
		if err != nil {
			return err
		}
		defer root.Close()
		if _, err = readIndex(directory{root}); errdefs.IsNotFound(err) {
			err = fmt.Errorf("%s is neither an OCI layout nor empty; choose another directory: %w", dir, errdefs.ErrFailedPrecondition)
		}
		return err
	}
	if err := writeJSON(dir, ocispec.ImageIndexFile, ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{}}); err != nil {
		return err
	}
	return writeJSON(dir, ocispec.ImageLayoutFile, ocispec.ImageLayout{Version: ocispec.ImageLayoutVersion})
}

func writeJSON(dir, name string, doc any) error {
	data, err := json.Marshal(doc)
	if err != nil {
		return err
	}
	f, err := newPart(dir)
	if err != nil {
		return err
	}
	defer f.drop()
	if _, err := f.Write(data); err != nil {
		return err
	}
	return f.keep(filepath.Join(dir, name))
}

// part is a file that has no name yet.
type part struct{ *os.File }

func newPart(dir string) (part, error) {
	f, err := os.CreateTemp(dir, ".part-*")
	return part{f}, err
}

// drop removes a part unless it was kept.
func (p part) drop() {
	_ = p.File.Close()
	_ = os.Remove(p.Name())
}

// keep gives a complete part its name.
func (p part) keep(name string) error {
	err := p.Chmod(0o644)
	if err == nil {
		err = p.Sync()
	}
	if err = errors.Join(err, p.File.Close()); err != nil {
		return err
	}
	return os.Rename(p.Name(), name)
}

func (d *layoutDest) blob(dgst digest.Digest) string {
	return filepath.Join(d.dir, filepath.FromSlash(blobPath(dgst)))
}

func (d *layoutDest) Has(_ context.Context, desc ocispec.Descriptor) (bool, error) {
	if err := desc.Digest.Validate(); err != nil {
		return false, fmt.Errorf("digest %.100q: %w: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	st, err := os.Stat(d.blob(desc.Digest))
	if os.IsNotExist(err) {
		return false, nil
	}
	return err == nil && st.Size() == desc.Size, err
}

func (d *layoutDest) PushBlob(ctx context.Context, desc ocispec.Descriptor, r io.Reader) error {
	if err := desc.Digest.Validate(); err != nil {
		return fmt.Errorf("digest %.100q: %w: %w", desc.Digest, err, errdefs.ErrInvalidArgument)
	}
	_, err := d.push(ctx, registry.Verify(r, desc), desc.Digest)
	return err
}

func (d *layoutDest) PushStream(ctx context.Context, mediaType string, r io.Reader) (ocispec.Descriptor, error) {
	desc, err := d.push(ctx, r, "")
	desc.MediaType = mediaType
	return desc, err
}

// push writes a blob of this digest or, when it is "", of the one that it has.
func (d *layoutDest) push(ctx context.Context, r io.Reader, dgst digest.Digest) (desc ocispec.Descriptor, err error) {
	dir := filepath.Join(d.dir, "blobs", cmp.Or(dgst, digest.Canonical.FromString("")).Algorithm().String())
	if err := os.MkdirAll(dir, 0o755); err != nil { //nolint:gosec // for others to read
		return desc, err
	}
	f, err := newPart(dir)
	if err != nil {
		return desc, err
	}
	defer f.drop()
	to := io.Writer(f)
	sum := digest.Canonical.Digester()
	if dgst == "" {
		to = io.MultiWriter(f, sum.Hash())
	}
	n, err := io.Copy(to, &cancellable{ctx, r})
	if err != nil {
		return desc, fmt.Errorf("write a blob of %s: %w", d.dir, err)
	}
	desc.Digest, desc.Size = cmp.Or(dgst, sum.Digest()), n
	return desc, f.keep(d.blob(desc.Digest))
}

// cancellable ends with its context.
type cancellable struct {
	ctx context.Context
	io.Reader
}

func (c *cancellable) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.Reader.Read(p)
}

func (d *layoutDest) PushManifest(ctx context.Context, mediaType string, data []byte, tag string) (ocispec.Descriptor, error) {
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	if want, err := digest.Parse(tag); err == nil {
		if want != desc.Digest {
			return desc, fmt.Errorf("the manifest has digest %s, not %s: %w", desc.Digest, want, errdefs.ErrInvalidArgument)
		}
		tag = ""
	}
	if err := d.PushBlob(ctx, desc, bytes.NewReader(data)); err != nil {
		return desc, err
	}
	subject, listed := registry.Referrer(desc, data)
	if tag == "" && subject == "" {
		return desc, nil
	}
	if subject == "" {
		listed.ArtifactType, listed.Annotations = "", nil
	}
	return desc, d.list(listed, tag)
}

// list adds a manifest to index.json, in the place of what had its tag.
func (d *layoutDest) list(desc ocispec.Descriptor, tag string) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if err := unix.Flock(int(d.lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("lock %s: %w", d.dir, err)
	}
	defer unix.Flock(int(d.lock.Fd()), unix.LOCK_UN) //nolint:errcheck // closing the file unlocks it, too
	root, err := os.OpenRoot(d.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	index, err := readIndex(directory{root})
	if err != nil {
		return err
	}
	if tag != "" {
		annotations := maps.Clone(desc.Annotations)
		if annotations == nil {
			annotations = map[string]string{}
		}
		annotations[ocispec.AnnotationRefName] = tag
		if strings.Contains(tag, "/") {
			annotations[containerdName] = tag
		}
		desc.Annotations = annotations
	}
	index.Manifests = slices.DeleteFunc(index.Manifests, func(old ocispec.Descriptor) bool {
		name := old.Annotations[ocispec.AnnotationRefName]
		return tag != "" && name == tag || old.Digest == desc.Digest && name == ""
	})
	if tag == "" && slices.ContainsFunc(index.Manifests, func(old ocispec.Descriptor) bool { return old.Digest == desc.Digest }) {
		return nil // it is listed by a name
	}
	index.Manifests = append(index.Manifests, desc)
	return writeJSON(d.dir, ocispec.ImageIndexFile, index)
}

func (d *layoutDest) Mount(context.Context, ocispec.Descriptor, Source) (bool, error) {
	return false, nil
}

func (d *layoutDest) Tag() string { return d.tag }

func (d *layoutDest) Close() error { return d.lock.Close() }
