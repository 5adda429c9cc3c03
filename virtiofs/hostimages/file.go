package hostimages

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sort"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/rootfs/store/shared"
	"github.com/tatami-containers/tatami/virtiofs"
)

// file is an image.
type file struct {
	c        *Client
	manifest digest.Digest
	name     string
	desc     *sharedimages.Opened
	boot     *os.File
	slots    []slot       // one for each segment
	uses     atomic.Int64 // reads, to see whether there are any
	suspect  atomic.Bool  // tatami-host shares nothing of it any more, as it is not what it should be

	link   *link     // on which it is open; protected by Client.mu, as all below
	handle uint32    // there
	since  time.Time // when it was not open any more
	gone   bool      // not the sandbox's any more
	err    error     // why it is never read again
	seen   int64     // uses when it was looked at last
}

var (
	_ virtiofs.File   = (*file)(nil)
	_ virtiofs.Mapper = (*file)(nil)
)

// slot is a segment, with what is shared of it.
type slot struct {
	share  atomic.Pointer[share]
	asking atomic.Bool // somebody asks for a share
}

// share is what tatami-host gave. All is immutable.
type share struct {
	seg    *shared.Segment // nil when it gives nothing
	link   *link           // that it came on
	handle uint32          // there
	gen    uint64          // no other share of the slot has it
}

// newFile takes over what the answer to Open says.
func newFile(c *Client, manifest digest.Digest, l *link, a answer) (*file, error) {
	f := &file{c: c, manifest: manifest, name: sharedimages.Name(manifest), boot: a.files[0], link: l, handle: a.Handle}
	var err error
	if f.desc, err = sharedimages.DecodeOpened(a.payload); err == nil {
		err = f.checkBoot()
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open image %s: %w", manifest, err), f.boot.Close())
	}
	f.slots = make([]slot, len(f.desc.Segments))
	c.used.Add(1)
	return f, nil
}

func (f *file) checkBoot() error {
	st, err := f.boot.Stat()
	if err == nil && (!st.Mode().IsRegular() || st.Size() < f.desc.Boot) {
		err = fmt.Errorf("a bootstrap of %d bytes came as %v of %d: %w", f.desc.Boot, st.Mode().Type(), st.Size(), errdefs.ErrDataLoss)
	}
	return err
}

// Size implements virtiofs.File.
func (f *file) Size() int64 { return f.desc.Size }

// at finds the segment that off lies in, or -1 and where the next one begins.
func (f *file) at(off int64) (k int, end int64) {
	segments := f.desc.Segments
	k = sort.Search(len(segments), func(i int) bool { return segments[i].Off+segments[i].Size > off })
	switch {
	case k == len(segments):
		return -1, f.desc.Size
	case segments[k].Off > off:
		return -1, segments[k].Off
	}
	return k, segments[k].Off + segments[k].Size
}

// Stamps are the share's generation and, in epochBits bits, its epoch.
const epochBits = 40

// Map implements virtiofs.Mapper.
func (f *file) Map(off int64) (*os.File, int64, int64, uint64) {
	f.uses.Add(1)
	if f.suspect.Load() {
		return nil, 0, 0, 0 // of the bootstrap neither
	}
	if off < f.desc.Boot {
		return f.boot, off, f.desc.Boot - off, 0
	}
	k, _ := f.at(off)
	if k < 0 {
		return nil, 0, 0, 0
	}
	sh := f.slots[k].share.Load()
	if sh == nil || sh.seg == nil {
		return nil, 0, 0, 0
	}
	data, at, n, epoch := sh.seg.Map(off - f.desc.Segments[k].Off)
	if epoch >= 1<<epochBits {
		return nil, 0, 0, 0
	}
	return data, at, n, sh.gen<<epochBits | epoch
}

// Valid implements virtiofs.Mapper. The bootstrap never changes.
func (f *file) Valid(off int64, stamp uint64) bool {
	if off < f.desc.Boot {
		return true
	}
	k, _ := f.at(off)
	sh := f.slots[k].share.Load()
	return sh != nil && sh.seg != nil && sh.gen == stamp>>epochBits && sh.seg.Valid(stamp&(1<<epochBits-1))
}

// ReadAt implements virtiofs.File.
func (f *file) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	for done := 0; done < len(p); {
		n, err := f.part(ctx, p[done:], off+int64(done))
		if err != nil {
			return done, fmt.Errorf("read image %s: %w", f.manifest, err)
		}
		done += n
	}
	return len(p), nil
}

// part reads as far as one place has the bytes.
func (f *file) part(ctx context.Context, p []byte, off int64) (int, error) {
	if n := f.local(p, off); n > 0 {
		return n, nil
	}
	k, end := f.at(off)
	if k >= 0 && f.shareAgain(ctx, k) {
		if n := f.local(p, off); n > 0 {
			return n, nil
		}
	}
	p = p[:min(int64(len(p)), end-off, sharedimages.MaxData)]
	return len(p), f.ask(ctx, p, off)
}

// local reads what the node has; 0 when that is nothing, or does not work.
func (f *file) local(p []byte, off int64) int {
	data, at, n, stamp := f.Map(off)
	if n <= 0 {
		return 0
	}
	got, _ := data.ReadAt(p[:min(int64(len(p)), n)], at) // tatami-host finds out why not
	if !f.Valid(off, stamp) {
		return 0
	}
	return got
}

// ask has tatami-host read. It waits while there is no connection, and while
// tatami-host itself cannot reach what it fetches from.
func (f *file) ask(ctx context.Context, p []byte, off int64) error {
	var o outage
	for {
		l, handle, err := f.opened(ctx)
		if err != nil {
			return err
		}
		a, err := l.do(ctx, sharedimages.Header{Op: sharedimages.Read, Handle: handle, Off: off, N: uint32(len(p))}, nil, p)
		switch {
		case err == nil && int(a.N) == len(p):
			f.c.reads.Add(1)
			f.c.readBytes.Add(int64(len(p)))
			return nil
		case err == nil:
			return io.ErrUnexpectedEOF
		case errors.Is(err, errLost) || errdefs.IsNotFound(err):
			f.c.closed(f, l, handle)
		case errdefs.IsUnavailable(err) && o.endure(ctx, f.c.cfg.Patience):
		default:
			return err
		}
	}
}

// outage is a time in which tatami-host cannot get the bytes of a read. Its zero value
// is before it begins.
type outage struct {
	since time.Time
	delay time.Duration
}

// endure waits before tatami-host is asked again. It is false when patience, or ctx,
// is over.
func (o *outage) endure(ctx context.Context, patience time.Duration) bool {
	if o.delay == 0 {
		o.since, o.delay = time.Now(), firstRetry
	}
	left := patience - time.Since(o.since)
	if left <= 0 {
		return false
	}
	sleep(ctx, min(o.delay, left))
	o.delay = min(2*o.delay, maxRetry)
	return ctx.Err() == nil
}

// opened waits until the image is open on a connection.
func (f *file) opened(ctx context.Context) (*link, uint32, error) {
	for {
		l, handle, changed, err := f.c.look(f)
		if err != nil || l != nil {
			return l, handle, err
		}
		wait := time.NewTimer(f.c.left(f))
		select {
		case <-changed:
		case <-wait.C:
		case <-ctx.Done():
			err = ctx.Err()
		}
		wait.Stop()
		if err != nil {
			return nil, 0, err
		}
	}
}

// shareAgain asks for a share of a segment unless there is one, and says whether it
// got one. While somebody else asks, it does not wait for that.
func (f *file) shareAgain(ctx context.Context, k int) bool {
	s := &f.slots[k]
	l, handle, _, err := f.c.look(f)
	if err != nil || l == nil || !s.stale(l, handle) || f.c.full() && !s.holds() || !s.asking.CompareAndSwap(false, true) {
		return false
	}
	defer s.asking.Store(false)
	if !s.stale(l, handle) { // another one was faster
		return true
	}
	seg, err := f.c.share(ctx, l, handle, k, f.desc.Segments[k].Size)
	if err != nil && (errors.Is(err, errLost) || ctx.Err() != nil) {
		return false
	}
	if err != nil { // what is not shared is asked for
		f.c.cfg.Log.Warn("a part of an image is not shared; all of it is asked for", "image", f.manifest, "segment", k, "err", err)
	}
	f.suspect.Store(errdefs.IsDataLoss(err))
	f.put(s, share{seg: seg, link: l, handle: handle})
	return err == nil
}

// stale says whether another share may be better than the one that is there: it has
// moved, or it is of another time that the image was open.
func (s *slot) stale(l *link, handle uint32) bool {
	sh := s.share.Load()
	return sh == nil || sh.link != l || sh.handle != handle || sh.seg != nil && sh.seg.Moved()
}

// holds says whether there is a share that another one would replace.
func (s *slot) holds() bool {
	sh := s.share.Load()
	return sh != nil && sh.seg != nil
}

// put replaces the share. Precondition: asking is held.
func (f *file) put(s *slot, next share) {
	if next.seg != nil {
		f.c.used.Add(1)
	}
	next.gen = 1
	old := s.share.Load()
	if old != nil {
		next.gen = (old.gen + 1) & (1<<(64-epochBits) - 1)
	}
	s.share.Store(&next)
	f.giveUp(old)
}

// giveUp closes a share, if there is one.
func (f *file) giveUp(s *share) {
	if s != nil && s.seg != nil {
		_ = s.seg.Close() // it was only read
		f.c.used.Add(-1)
	}
}

// same says whether another answer to Open is about the same bytes: with the same
// bootstrap, in the same file, come the same segments.
func (f *file) same(o *file) bool {
	a, err := f.boot.Stat()
	b, berr := o.boot.Stat()
	return errors.Join(err, berr) == nil && os.SameFile(a, b) &&
		f.desc.Size == o.desc.Size && f.desc.Boot == o.desc.Boot && slices.Equal(f.desc.Segments, o.desc.Segments)
}

// close gives back all descriptors. Precondition: nobody reads the file.
func (f *file) close() {
	for k := range f.slots {
		f.giveUp(f.slots[k].share.Load())
	}
	_ = f.boot.Close() // only read
	f.c.used.Add(-1)
}
