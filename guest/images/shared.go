package images

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path/filepath"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/mount/thread"
)

// shared is the directories in which the node may show its image files over
// virtio-fs. Whoever asks that file system may have to wait for the node, and
// nothing can call him back: every question is asked by a thread of its own,
// which stays behind when nobody waits any more.
type shared struct {
	dirs []string
	busy atomic.Int32 // threads that ask
}

// maxBusy bounds the threads that wait for a file system. The store has fewer
// fetches under way, so that only what does not answer brings them so far.
const maxBusy = 64

// lookupTimeout bounds the search for an image's file: the node answers in
// milliseconds, if it does.
const lookupTimeout = 5 * time.Second

// find returns the path of the image's file. The error is ErrNotFound when no
// directory has it, and errNoShare too when there is no directory at all.
func (s *shared) find(ctx context.Context, manifest digest.Digest) (string, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, lookupTimeout,
		fmt.Errorf("virtio-fs does not answer within %v: %w", lookupTimeout, errdefs.ErrUnavailable))
	defer cancel()
	var path string // written before done has its element
	done, err := s.ask(func() (err error) {
		path, err = s.lookUp(sharedimages.Name(manifest))
		return err
	})
	if err != nil {
		return "", err
	}
	select {
	case err := <-done:
		return path, err
	case <-ctx.Done():
		return "", fmt.Errorf("look for the node's image file: %w", context.Cause(ctx))
	}
}

// errNoShare says that the node shows no image files here.
var errNoShare = fmt.Errorf("no virtio-fs with image files: %w", errdefs.ErrNotFound)

// lookUp finds a file in the directories. Precondition: the thread is isolated.
func (s *shared) lookUp(name string) (string, error) {
	why := errNoShare
	for _, dir := range s.dirs {
		path := filepath.Join(dir, name)
		var st unix.Stat_t
		err := unix.Lstat(path, &st)
		if err == nil {
			return path, nil
		}
		if !absent(err) {
			why = fmt.Errorf("look for the node's image file %s: %w: %w", path, err, errdefs.ErrUnavailable)
		} else if err := unix.Lstat(dir, &st); err == nil {
			why = fmt.Errorf("the node has no image file %s: %w", path, errdefs.ErrNotFound)
		}
	}
	return "", why
}

func absent(err error) bool { return errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ENOTDIR) }

// ask runs f on an isolated thread. The channel gets its error.
func (s *shared) ask(f func() error) (<-chan error, error) {
	if s.busy.Add(1) > maxBusy {
		s.busy.Add(-1)
		return nil, fmt.Errorf("virtio-fs has left %d questions without an answer: %w", maxBusy, errdefs.ErrUnavailable)
	}
	done := make(chan error, 1)
	go func() {
		defer s.busy.Add(-1)
		done <- thread.Isolated(f)
	}()
	return done, nil
}

// sharedSource reads plain ranges of segments out of the node's image file.
type sharedSource struct {
	files    *shared
	manifest digest.Digest
	size     int64 // of the image
	trust    Trust
}

func (*sharedSource) Name() string { return SourceVirtioFS }

// Vouches implements store.Voucher, as for relaySource.
func (s *sharedSource) Vouches(*index.Segment) bool { return s.trust == TrustHost }

func (s *sharedSource) Fetch(ctx context.Context, seg *index.Segment, off, n int64) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	b := &sharedBody{ctx: ctx, cancel: cancel, pieces: make(chan piece)}
	_, err := s.files.ask(func() error {
		s.read(b, seg.Off+off, n)
		return nil
	})
	if err == nil {
		err = b.next()
	}
	if err != nil {
		cancel()
		return nil, fmt.Errorf("read %s from virtio-fs: %w", s.manifest, err)
	}
	return b, nil
}

// pieceSize is what is read at a time: a request of virtio-fs has up to 1 MiB,
// and two pieces are in memory.
const pieceSize = 256 << 10

// read sends what opening the file came to, n bytes from off on, and io.EOF.
// Precondition: the thread is isolated.
func (s *sharedSource) read(b *sharedBody, off, n int64) {
	fd, err := s.open()
	if !b.send(piece{err: err}) || err != nil {
		if fd >= 0 {
			_ = unix.Close(fd) // only read
		}
		return
	}
	defer func() { _ = unix.Close(fd) }()
	var bufs [2][]byte // the other one is with the reader
	for k := 0; n > 0; k = 1 - k {
		if bufs[k] == nil {
			bufs[k] = make([]byte, min(n, pieceSize))
		}
		p, err := pread(fd, bufs[k][:min(n, pieceSize)], off)
		if !b.send(piece{p, err}) || err != nil {
			return
		}
		off, n = off+int64(len(p)), n-int64(len(p))
	}
	b.send(piece{err: io.EOF})
}

// open opens the file, whose size tells it from a file of another version.
func (s *sharedSource) open() (int, error) {
	path, err := s.files.lookUp(sharedimages.Name(s.manifest))
	if err != nil {
		return -1, err
	}
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if absent(err) {
		return -1, fmt.Errorf("open %s: %w: %w", path, err, errdefs.ErrNotFound)
	}
	if err != nil {
		return -1, fmt.Errorf("open %s: %w: %w", path, err, errdefs.ErrUnavailable)
	}
	var st unix.Stat_t
	err = unix.Fstat(fd, &st)
	switch {
	case err != nil:
		err = fmt.Errorf("stat %s: %w: %w", path, err, errdefs.ErrUnavailable)
	case st.Mode&unix.S_IFMT != unix.S_IFREG || st.Size != s.size:
		err = fmt.Errorf("%s is no file of %d bytes as the image is: %w", path, s.size, errdefs.ErrNotFound)
	default:
		return fd, nil
	}
	return -1, errors.Join(err, unix.Close(fd))
}

// pread reads at least one byte.
func pread(fd int, p []byte, off int64) ([]byte, error) {
	for {
		n, err := unix.Pread(fd, p, off)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return nil, fmt.Errorf("at %d: %w: %w", off, err, errdefs.ErrUnavailable)
		case n == 0:
			return nil, fmt.Errorf("at %d: %w: %w", off, io.ErrUnexpectedEOF, errdefs.ErrUnavailable)
		}
		return p[:n], nil
	}
}

// piece is what a reading thread hands over: bytes, or why there are no more.
type piece struct {
	data []byte
	err  error
}

// sharedBody is one range under way.
type sharedBody struct {
	ctx    context.Context
	cancel context.CancelFunc
	pieces chan piece
	piece
}

// send hands a piece over and says whether anybody wanted it.
func (b *sharedBody) send(p piece) bool {
	select {
	case b.pieces <- p:
		return true
	case <-b.ctx.Done():
		return false
	}
}

// next takes a piece over. The one before goes back to the thread.
func (b *sharedBody) next() error {
	select {
	case b.piece = <-b.pieces:
	case <-b.ctx.Done():
		b.piece = piece{err: context.Cause(b.ctx)}
	}
	return b.err
}

func (b *sharedBody) Read(p []byte) (int, error) {
	if len(b.data) == 0 && b.err == nil {
		_ = b.next() // it is in err
	}
	if len(b.data) == 0 {
		return 0, b.err
	}
	n := copy(p, b.data)
	b.data = b.data[n:]
	return n, nil
}

func (b *sharedBody) Close() error {
	b.cancel()
	return nil
}
