package blobs

import (
	"context"
	"errors"
	"io"
	"os"
	"sync"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Reader reads a part of a blob that is here or on its way. It is for one
// goroutine.
type Reader struct {
	c        *Cache
	ctx      context.Context
	from     Origin
	desc     ocispec.Descriptor
	at, left int64 // bytes of the blob
	e        *entry
	retried  bool          // it has begun a download after another one failed
	alone    io.ReadCloser // from the origin, when the node cannot keep the blob
	unfollow func()        // the download is not its work any more; nil when it never was
	once     sync.Once
}

// Read implements io.Reader.
func (r *Reader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	p = p[:min(int64(len(p)), r.left)]
	if r.alone == nil {
		n, err := r.wait()
		if err != nil {
			return 0, err
		}
		if n > 0 {
			n, err := r.e.file.ReadAt(p[:min(int64(len(p)), n)], r.at)
			return r.advance(n, err)
		}
	}
	n, err := r.alone.Read(p)
	return r.advance(n, err)
}

func (r *Reader) advance(n int, err error) (int, error) {
	r.at += int64(n)
	r.left -= int64(n)
	if errors.Is(err, io.EOF) {
		err = nil
		if n == 0 {
			err = io.ErrUnexpectedEOF
		}
	}
	return n, err
}

// wait returns how many bytes there are to be read, at least one. 0 without an
// error means that the rest is to be read from the origin.
func (r *Reader) wait() (int64, error) {
	for {
		filled, by, changed, err := r.e.state()
		if filled > r.at {
			return min(filled-r.at, r.left), nil
		}
		if err != nil {
			if err := r.recover(by, err); err != nil || r.alone != nil {
				return 0, err
			}
			continue
		}
		select {
		case <-changed:
		case <-r.ctx.Done():
			return 0, r.ctx.Err()
		}
	}
}

// recover decides what becomes of r after the download that by began has failed
// with err: it goes on with the download once itself, as its own origin may do
// better (each caller has its own rights and tokens).
func (r *Reader) recover(by *Reader, err error) error {
	if errdefs.IsDataLoss(err) {
		return err
	}
	if errors.Is(err, errDisk) {
		body, err := r.from.Range(r.ctx, r.desc.Digest, r.at, r.left)
		r.alone = body
		return err
	}
	if by == r || r.retried {
		return err
	}
	r.retried = true
	r.c.mu.Lock()
	defer r.c.mu.Unlock()
	if r.c.entries[r.e.key] != r.e || r.c.closed {
		return err
	}
	r.c.start(r)
	return nil
}

// Map tells where the next bytes lie: n of them at off in f. n is 0 when they have to
// be read. A blob's bytes do not change once they are there.
func (r *Reader) Map() (f *os.File, off, n int64) {
	if r.alone != nil || r.left == 0 {
		return nil, 0, 0
	}
	filled, _, _, _ := r.e.state()
	return r.e.file, r.at, max(0, min(filled-r.at, r.left))
}

// Sent says that n bytes of what Map told were taken from there.
func (r *Reader) Sent(n int64) error {
	_, err := r.advance(int(n), nil)
	return err
}

// Close implements io.Closer.
func (r *Reader) Close() error {
	r.once.Do(func() {
		if r.alone != nil {
			_ = r.alone.Close() // it was only read
		}
		if r.unfollow != nil {
			r.unfollow()
		}
		r.c.release(r.e)
	})
	return nil
}
