package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Open reads the whole blob that desc names as one ordered stream. A blob of
// more than one Config.Chunk is fetched as several ranges at the same time, as
// many as make it faster (window); a smaller one, and any blob of a registry without ranges, as one. Lost bodies
// are resumed. The stream has exactly desc.Size bytes or ends with an error;
// the caller checks the digest. Close ends all requests and waits for them.
func (r *Repository) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	p := piece{kind: "blobs", digest: desc.Digest, end: desc.Size, size: desc.Size}
	if desc.Size < 0 {
		return nil, r.fault(p.object(), errdefs.ErrInvalidArgument, fmt.Errorf("a size of %d bytes", desc.Size))
	}
	chunk := r.client.cfg.Chunk
	if desc.Size <= chunk || r.client.cfg.InFlight < 2 || !r.Ranged() {
		rr, err := r.open(ctx, p)
		if err != nil {
			return nil, err
		}
		return rr, nil
	}
	return r.openParallel(ctx, p)
}

// openParallel asks for the first chunk and decides by the answer: a server
// that sends the blob instead of a range of it is read to the end.
func (r *Repository) openParallel(ctx context.Context, p piece) (io.ReadCloser, error) {
	ctx, cancel := context.WithCancel(ctx)
	first := p
	first.end = r.client.cfg.Chunk
	rr, err := r.open(ctx, first)
	if err != nil {
		cancel()
		return nil, err
	}
	if rr.whole {
		rr.piece.end = p.end
		return &single{rangeReader: rr, cancel: cancel}, nil
	}
	s := &stream{ctx: ctx, cancel: cancel, repo: r, peer: r.client.peers.get(r.host), rest: p, chunk: r.client.cfg.Chunk}
	s.rest.off = first.end
	s.may() // always, for the first one
	s.launch(rr, first)
	return s, nil
}

// single is a rangeReader with a context of its own.
type single struct {
	*rangeReader
	cancel context.CancelFunc
}

func (s *single) Close() error {
	err := s.rangeReader.Close()
	s.cancel()
	return err
}

// stream reads a blob in order from ranges that are fetched at the same time.
// Its fields belong to the reader's goroutine; a fetch shares only its part.
type stream struct {
	ctx    context.Context
	cancel context.CancelFunc
	repo   *Repository
	peer   *peer   // says how many ranges are worth it
	rest   piece   // not asked for yet
	chunk  int64   // bytes
	parts  []*part // under way, by offset; the first one is being read
	free   [][]byte
	wg     sync.WaitGroup
	err    error // sticky
}

// part is one range being fetched into buf.
type part struct {
	buf  []byte
	read int           // bytes handed to the reader
	wake chan struct{} // has one element when there is news

	mu     sync.Mutex
	filled int   // protected by mu
	err    error // why no more will come; protected by mu
}

// launch starts to fetch p; rr is its answer when it has been asked for already.
func (s *stream) launch(rr *rangeReader, p piece) {
	part := &part{buf: s.buffer(p.end - p.off), wake: make(chan struct{}, 1)}
	s.parts = append(s.parts, part)
	s.wg.Go(func() {
		defer s.peer.give()
		s.fetch(part, rr, p)
	})
}

// may tells whether one more range is worth it, and takes it then.
func (s *stream) may() bool {
	return s.peer.take(s.repo.client.cfg.InFlight*streamsPerHost, len(s.parts) > 0)
}

// buffer returns n bytes, one chunk at most, used before if possible.
func (s *stream) buffer(n int64) []byte {
	if last := len(s.free) - 1; last >= 0 {
		buf := s.free[last]
		s.free = s.free[:last]
		return buf[:n]
	}
	return make([]byte, n, s.chunk)
}

func (s *stream) fetch(dst *part, rr *rangeReader, p piece) {
	if rr == nil {
		var err error
		if rr, err = s.repo.open(s.ctx, p); err != nil {
			dst.add(0, err)
			return
		}
	}
	defer func() { _ = rr.Close() }() // never fails
	for filled := 0; filled < len(dst.buf); {
		n, err := rr.Read(dst.buf[filled:])
		filled += n
		dst.add(n, err)
		if s.peer.got(n) && rr.trip != nil {
			rr.trip.up.Explore()
		}
		if err != nil {
			return
		}
	}
}

// add tells the reader about n more bytes, or that none will follow.
func (p *part) add(n int, err error) {
	p.mu.Lock()
	p.filled += n
	p.err = err
	p.mu.Unlock()
	select {
	case p.wake <- struct{}{}:
	default: // the reader has not seen the last news yet
	}
}

func (p *part) state() (filled int, err error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.filled, p.err
}

// Read implements io.Reader.
func (s *stream) Read(p []byte) (int, error) {
	if s.err != nil || len(p) == 0 {
		return 0, s.err
	}
	s.fill()
	if len(s.parts) == 0 {
		s.err = io.EOF
		return 0, s.err
	}
	n, err := s.readPart(s.parts[0], p)
	if err != nil {
		s.err = err
		s.cancel()
	}
	return n, err
}

// fill keeps as many ranges under way as are worth it, InFlight at most.
func (s *stream) fill() {
	for len(s.parts) < s.repo.client.cfg.InFlight && s.rest.off < s.rest.end && s.may() {
		next := s.rest
		next.end = min(next.off+s.chunk, s.rest.end)
		s.rest.off = next.end
		s.launch(nil, next)
	}
}

// readPart waits for bytes of the first part and copies what is there.
func (s *stream) readPart(part *part, p []byte) (int, error) {
	for {
		filled, err := part.state()
		if part.read < filled {
			n := copy(p, part.buf[part.read:filled])
			part.read += n
			if part.read == len(part.buf) {
				s.free = append(s.free, part.buf)
				s.parts = s.parts[1:]
			}
			return n, nil
		}
		if err != nil {
			return 0, err
		}
		select {
		case <-part.wake:
		case <-s.ctx.Done():
			return 0, s.ctx.Err()
		}
	}
}

// Close implements io.Closer. It must not run beside Read.
func (s *stream) Close() error {
	s.cancel()
	s.wg.Wait()
	s.parts, s.free = nil, nil
	if s.err == nil {
		s.err = errors.New("read of a closed stream")
	}
	return nil
}
