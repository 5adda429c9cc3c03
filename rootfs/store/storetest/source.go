package storetest

import (
	"context"
	"fmt"
	"io"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Source serves segments from memory. It is a store.Source.
type Source struct {
	label string

	// Fault says how a request goes wrong; nil or the zero Fault is well. It is
	// set before the first request.
	Fault func(Request) Fault
	// Link, when set, is the line that all bodies share.
	Link *Link

	mu       sync.Mutex
	plain    map[index.ID][]byte
	requests []Request
	blocks   map[index.ID][]int64 // bytes served of each block
}

// Request is one call of Fetch.
type Request struct {
	ID     index.ID
	Off, N int64
	Number int // of requests before it
}

// Fault is what goes wrong with one request. Offsets are in the segment.
type Fault struct {
	Err     error           // of Fetch
	Wait    <-chan struct{} // before Fetch returns; a cancelled context ends it
	Corrupt func(off int64) bool
	EndAt   int64 // the body ends here without an error, when > 0
	StallAt int64 // no byte from here on until the context ends, when > 0
	HoldAt  int64 // no byte from here on until Hold is closed, when > 0
	Hold    <-chan struct{}
}

// NewSource makes a source of all segments of the given images.
func NewSource(label string, images ...*Image) *Source {
	s := &Source{label: label, plain: map[index.ID][]byte{}, blocks: map[index.ID][]int64{}}
	for _, img := range images {
		for _, g := range img.Index.Segments {
			s.plain[g.ID] = img.Plain[g.Off:g.End()]
			s.blocks[g.ID] = make([]int64, g.Table.Size/index.BlockSize)
		}
	}
	return s
}

// Vouching is a Source that vouches for the segments that Knows accepts. It is a
// store.Voucher.
type Vouching struct {
	*Source
	Knows func(id index.ID) bool
}

// Vouches implements store.Voucher.
func (v Vouching) Vouches(seg *index.Segment) bool { return v.Knows(seg.ID) }

// Name implements store.Source.
func (s *Source) Name() string { return s.label }

// Fetch implements store.Source.
func (s *Source) Fetch(ctx context.Context, seg *index.Segment, off, n int64) (io.ReadCloser, error) {
	s.mu.Lock()
	plain, ok := s.plain[seg.ID]
	r := Request{ID: seg.ID, Off: off, N: n, Number: len(s.requests)}
	s.requests = append(s.requests, r)
	s.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("segment %s: %w", seg.ID, errdefs.ErrNotFound)
	}
	if off < 0 || n <= 0 || off > int64(len(plain))-n {
		return nil, fmt.Errorf("range %d+%d of %d bytes: %w", off, n, len(plain), errdefs.ErrInvalidArgument)
	}
	var fault Fault
	if s.Fault != nil {
		fault = s.Fault(r)
	}
	if err := pause(ctx, fault.Wait); err != nil {
		return nil, err
	}
	if fault.Err != nil {
		return nil, fault.Err
	}
	if s.Link != nil {
		if err := s.Link.open(ctx); err != nil {
			return nil, err
		}
	}
	return &body{ctx: ctx, s: s, r: r, fault: fault, at: off, end: off + n, plain: plain}, nil
}

func pause(ctx context.Context, until <-chan struct{}) error {
	if until == nil {
		return ctx.Err()
	}
	select {
	case <-until:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// Requests returns the calls of Fetch so far.
func (s *Source) Requests() []Request {
	s.mu.Lock()
	defer s.mu.Unlock()
	return append([]Request{}, s.requests...)
}

// Bytes is how many bytes have been served.
func (s *Source) Bytes() int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := int64(0)
	for _, blocks := range s.blocks {
		for _, b := range blocks {
			n += b
		}
	}
	return n
}

// Twice is how many blocks were served more than once.
func (s *Source) Twice() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	n := 0
	for _, blocks := range s.blocks {
		for _, b := range blocks {
			if b > index.BlockSize {
				n++
			}
		}
	}
	return n
}

func (s *Source) count(id index.ID, off, n int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for end := off + n; off < end; {
		m := min(end, off-off%index.BlockSize+index.BlockSize) - off
		s.blocks[id][off/index.BlockSize] += m
		off += m
	}
}

type body struct {
	ctx     context.Context
	s       *Source
	r       Request
	fault   Fault
	at, end int64
	plain   []byte
}

const maxRead = 32 << 10 // as a connection gives

func (b *body) Read(p []byte) (int, error) {
	if err := b.ctx.Err(); err != nil {
		return 0, err
	}
	end, err := b.limit()
	if err != nil || b.at >= end {
		return 0, orEOF(err)
	}
	n := min(int64(len(p)), end-b.at, maxRead)
	if b.s.Link != nil {
		if err := b.s.Link.move(b.ctx, n); err != nil {
			return 0, err
		}
	}
	copy(p, b.plain[b.at:b.at+n])
	for i := int64(0); b.fault.Corrupt != nil && i < n; i++ {
		if b.fault.Corrupt(b.at + i) {
			p[i] ^= 0x40
		}
	}
	b.s.count(b.r.ID, b.at, n)
	b.at += n
	return int(n), nil
}

// limit is where the body ends or pauses at present.
func (b *body) limit() (int64, error) {
	end := b.end
	if e := b.fault.EndAt; e > 0 {
		end = min(end, e)
	}
	if e := b.fault.StallAt; e > 0 {
		if b.at >= e {
			<-b.ctx.Done()
			return 0, b.ctx.Err()
		}
		end = min(end, e)
	}
	if e := b.fault.HoldAt; e > 0 && b.at < e {
		end = min(end, e)
	} else if e > 0 {
		return end, pause(b.ctx, b.fault.Hold)
	}
	return end, nil
}

func orEOF(err error) error {
	if err != nil {
		return err
	}
	return io.EOF
}

func (b *body) Close() error {
	if b.s.Link != nil {
		b.s.Link.close()
	}
	return nil
}

// Link is a line with a delay for each request and a rate for all together.
type Link struct {
	Delay time.Duration // of the first byte of each request
	Rate  int64         // bytes a second

	mu     sync.Mutex
	bodies int       // open ones
	free   time.Time // when the line has sent what was asked of it
}

// buffered is how many bytes are on their way to a reader who does not read just
// now, as a socket has it: a busy machine does not make the line slower.
const buffered = 1 << 20

func (l *Link) open(ctx context.Context) error {
	if err := sleep(ctx, l.Delay); err != nil {
		return err
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.bodies++; l.bodies == 1 && l.free.Before(time.Now()) {
		l.free = time.Now() // it was idle
	}
	return nil
}

func (l *Link) close() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.bodies--
}

// move takes n bytes' time on the line. Delays under a millisecond are saved up,
// because that is what a timer gives.
func (l *Link) move(ctx context.Context, n int64) error {
	l.mu.Lock()
	now := time.Now()
	if least := now.Add(-l.time(buffered)); l.free.Before(least) {
		l.free = least
	}
	l.free = l.free.Add(l.time(n))
	wait := l.free.Sub(now)
	l.mu.Unlock()
	if wait < time.Millisecond {
		return ctx.Err()
	}
	return sleep(ctx, wait)
}

func (l *Link) time(n int64) time.Duration { return time.Duration(n * int64(time.Second) / l.Rate) }

func sleep(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
