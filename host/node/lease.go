package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/rootfs/store"
)

// Kinds of objects, as the relay's paths name them.
const (
	kindManifest = "manifests"
	kindBlob     = "blobs"
	kindSegment  = "segments"
)

// segmentType is the media type of a segment's plain bytes.
const segmentType = "application/octet-stream"

// Lease is the right to read one prepared image; while it is held, the image
// cannot be removed. Missing bytes are fetched from the repository that the
// lease was taken for. It is what the relay serves.
type Lease struct {
	n      *Node
	record *record
	repo   *registry.Repository
	open   *store.Image
	at     map[digest.Digest]index.Segment // by ID; tables are the store's
	once   sync.Once
	ended  chan struct{} // closed by Close

	recorded atomic.Bool // Record was called
}

// Lease takes a lease on what ref meant when it was prepared last. ErrNotFound
// when it was not prepared.
func (n *Node) Lease(ctx context.Context, ref, platform string) (*Lease, error) {
	named, _, err := parseTarget(ref, platform)
	if err != nil {
		return nil, err
	}
	m := n.meant(target{reference: named.String(), platform: platform})
	if m == nil {
		return nil, fmt.Errorf("image %s is not on the node: prepare it first: %w", named, errdefs.ErrNotFound)
	}
	return n.lease(ctx, named, m.Manifest)
}

// LeaseManifest takes a lease on the image with this manifest, in the
// repository of ref. ErrNotFound when it was not prepared.
func (n *Node) LeaseManifest(ctx context.Context, ref string, manifest digest.Digest) (*Lease, error) {
	named, _, err := parseTarget(ref, "")
	if err != nil {
		return nil, err
	}
	return n.lease(ctx, named, manifest)
}

func (n *Node) lease(ctx context.Context, ref reference.Named, manifest digest.Digest) (*Lease, error) {
	n.mu.Lock()
	r, ok := n.images[manifest]
	ok = ok && r.countsFor(ref)
	if ok {
		n.leases[manifest]++
	}
	n.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("image %s is not on the node: prepare it first: %w", ref, errdefs.ErrNotFound)
	}
	l := &Lease{n: n, record: r, repo: n.cfg.Registry.Repository(ref), ended: make(chan struct{})}
	if err := l.load(ctx); err != nil {
		l.Close()
		return nil, fmt.Errorf("open image %s: %w", ref, err)
	}
	return l, nil
}

// load opens the image in the store. The store does not make what describes an
// image durable, so after a crash of the machine the node's own copy of the
// index brings it back.
func (l *Lease) load(ctx context.Context) (err error) {
	sources := []store.Source{&source{n: l.n, repo: l.repo, layers: l.record.Layers}}
	l.open, err = l.n.store.LoadImage(ctx, l.record.Manifest.Digest, sources)
	if errdefs.IsNotFound(err) {
		l.open, err = l.reload(ctx, sources)
	}
	if err != nil {
		return err
	}
	l.at = map[digest.Digest]index.Segment{}
	for _, s := range l.open.Segments() {
		l.at[s.ID] = s
	}
	return nil
}

func (l *Lease) reload(ctx context.Context, sources []store.Source) (*store.Image, error) {
	data, err := l.n.readFile(l.record, indexFile)
	if err != nil {
		return nil, err
	}
	img, err := index.DecodeImage(data)
	if err != nil {
		return nil, err
	}
	return l.n.store.OpenImage(ctx, img, sources)
}

// Close ends the lease. Nothing may be read through it any more. It is
// idempotent.
func (l *Lease) Close() {
	l.once.Do(func() {
		close(l.ended)
		if l.open != nil {
			_ = l.open.Close() // it has nothing to report
		}
		l.n.mu.Lock()
		defer l.n.mu.Unlock()
		d := l.record.Manifest.Digest
		if l.n.leases[d]--; l.n.leases[d] == 0 {
			delete(l.n.leases, d)
		}
	})
}

// SetFlow says for whom is read through this lease (store.Image.SetFlow).
func (l *Lease) SetFlow(f *sched.Flow) { l.open.SetFlow(f) }

// Flow is for whom is read through this lease.
func (l *Lease) Flow() *sched.Flow { return l.open.Flow() }

// Manifest is the digest of the image's manifest.
func (l *Lease) Manifest() digest.Digest { return l.record.Manifest.Digest }

// Referrers describes the index artifact.
func (l *Lease) Referrers() []ocispec.Descriptor {
	return []ocispec.Descriptor{l.record.Artifact}
}

// Find describes an object of the image.
func (l *Lease) Find(kind string, d digest.Digest) (ocispec.Descriptor, bool) {
	switch kind {
	case kindManifest:
		return find(d, l.record.Manifest, l.record.Artifact, l.record.Parent, l.record.Bound)
	case kindBlob:
		if desc, ok := find(d, l.record.Config, l.record.Index, ocispec.DescriptorEmptyJSON); ok {
			return desc, true
		}
		return l.remote(d)
	case kindSegment:
		s, ok := l.at[d]
		if !ok {
			return ocispec.Descriptor{}, false
		}
		return ocispec.Descriptor{MediaType: segmentType, Digest: d, Size: s.Table.Size}, true
	}
	return ocispec.Descriptor{}, false
}

func find(d digest.Digest, among ...ocispec.Descriptor) (ocispec.Descriptor, bool) {
	for _, desc := range among {
		if desc.Digest == d {
			return desc, true
		}
	}
	return ocispec.Descriptor{}, false
}

// remote describes a blob of the image that only the registry has.
func (l *Lease) remote(d digest.Digest) (ocispec.Descriptor, bool) {
	if desc, ok := find(d, l.record.Blobs...); ok {
		return desc, true
	}
	return find(d, l.record.BoundFiles...)
}

// Open returns the bytes [off, off+n) of an object that Find describes. Layers come
// from the node's blobs or the registry (package blobs).
func (l *Lease) Open(ctx context.Context, kind string, d digest.Digest, off, n int64) (io.ReadCloser, error) {
	if err := l.n.forgedIn(l.record); err != nil {
		return nil, fmt.Errorf("open %s of image %s: %w", d, l.Manifest(), err)
	}
	if kind == kindSegment {
		s, ok := l.at[d]
		if !ok || off < 0 || n < 0 || off > s.Table.Size || n > s.Table.Size-off {
			return nil, fmt.Errorf("range %d+%d of segment %s: %w", off, n, d, errdefs.ErrInvalidArgument)
		}
		return &segmentReader{ctx: ctx, image: l.open, at: s.Off + off, left: n}, nil
	}
	for name, desc := range l.record.described() {
		if desc.Digest == d {
			return l.openFile(name, off, n)
		}
	}
	if d == ocispec.DescriptorEmptyJSON.Digest {
		return section(nopCloser{bytes.NewReader(ocispec.DescriptorEmptyJSON.Data)}, off, n), nil
	}
	if desc, ok := l.remote(d); ok && kind == kindBlob {
		return l.n.blobs.Open(ctx, l.repo, desc, off, n)
	}
	return nil, fmt.Errorf("open %s of image %s: %w", d, l.Manifest(), errdefs.ErrNotFound)
}

func (l *Lease) openFile(name string, off, n int64) (io.ReadCloser, error) {
	file, err := os.Open(filepath.Join(l.n.files.image(l.Manifest()), name))
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: %w", errdefs.ErrNotFound, err)
	}
	if err != nil {
		return nil, fmt.Errorf("open %s of image %s: %w", name, l.Manifest(), err)
	}
	return &fileSection{file, off, n}, nil
}

type nopCloser struct{ *bytes.Reader }

func (nopCloser) Close() error { return nil }

type readerAtCloser interface {
	io.ReaderAt
	io.Closer
}

// fileSection is a part of a file that does not change.
type fileSection struct {
	file     *os.File
	at, left int64 // bytes
}

// Read implements io.Reader.
func (s *fileSection) Read(p []byte) (int, error) {
	if s.left == 0 {
		return 0, io.EOF
	}
	n, err := s.file.ReadAt(p[:min(int64(len(p)), s.left)], s.at)
	s.at += int64(n)
	s.left -= int64(n)
	return n, err
}

// Map says where the next bytes are.
func (s *fileSection) Map() (f *os.File, off, n int64) { return s.file, s.at, s.left }

// Sent says that n bytes were taken from where Map said.
func (s *fileSection) Sent(n int64) error {
	s.at += n
	s.left -= n
	return nil
}

// Close implements io.Closer.
func (s *fileSection) Close() error { return s.file.Close() }

// section reads a part of r and closes it.
func section(r readerAtCloser, off, n int64) io.ReadCloser {
	return struct {
		io.Reader
		io.Closer
	}{io.NewSectionReader(r, off, n), r}
}

// segmentReader reads verified bytes out of the store.
type segmentReader struct {
	ctx      context.Context
	image    *store.Image
	at, left int64 // in the image, bytes
	mapped   store.Mapped
}

// Read implements io.Reader. It fills p or reaches the end.
func (r *segmentReader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	m, err := r.image.ReadAt(r.ctx, p[:min(int64(len(p)), r.left)], r.at)
	r.at += int64(m)
	r.left -= int64(m)
	if errors.Is(err, io.EOF) { // of the image, which is the end of this, too
		err = nil
	}
	return m, err
}

// Map says where the next bytes are in the store's files; see store.Mapped. n is 0
// when they have to be read.
func (r *segmentReader) Map() (f *os.File, off, n int64) {
	r.mapped = r.image.Map(r.ctx, r.at, r.left)
	return r.mapped.File, r.mapped.Off, r.mapped.N
}

// Sent says that n bytes were sent from where Map said.
func (r *segmentReader) Sent(n int64) error {
	if !r.mapped.Valid() {
		return fmt.Errorf("bytes of image %s went while they were sent: %w", r.image.Manifest(), errdefs.ErrUnavailable)
	}
	r.at += n
	r.left -= n
	return nil
}

// Close implements io.Closer.
func (r *segmentReader) Close() error { return nil }
