package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// fetch brings a run of claimed chunks, [next, stop) of its segment, in order.
// It runs under its handle's context, not under that of a reader.
type fetch struct {
	v       *view
	by      *read // the read that started it, nil for background ones
	largest int64 // chunk length in the run, bytes
	local   bool  // its chunks are probably in the store already; protected by segment.mu
	ahead   int64 // bytes that count as readahead in flight

	// next changes only in run's goroutine; others read both under segment.mu.
	next, stop int

	work   *sched.Work    // how urgent it is
	base   sched.Standing // of work when nobody waits, immutable
	joined []await        // who waits for its chunks; protected by segment.mu

	// The request under way, when it cannot become more urgent: what it was made as, and
	// what has it made anew, else nil. Protected by segment.mu.
	asked sched.Rank
	again context.CancelCauseFunc

	// Why the last attempt failed; run's goroutine only.
	down   bool // a source does not work at present
	wrong  bool // a source gave wrong bytes
	blamed bool // it asks somebody else the next time

	paused bool // waits until sources work again; protected by segment.mu
}

// maxBad is after how many chunks with wrong bytes from all sources a fetch
// gives up the rest of its run.
const maxBad = 4

// maxWrong is how often a reader's fetch asks for a chunk of which it gets wrong
// bytes: what spoiled them on their way may have passed.
const maxWrong = 3

func (f *fetch) run() {
	defer f.v.h.s.stats.fetches.Add(-1)
	defer f.v.h.s.stats.ahead.Add(-f.ahead)
	if f.isLocal() {
		f.link()
	}
	var o outage
	for bad, wrong := 1, 1; f.more(); {
		before := f.next
		err := f.attempt()
		if f.next > before {
			wrong = 1
		}
		switch {
		case err == nil:
		case f.endure(&o):
		case f.wrong && f.by != nil && wrong < maxWrong:
			wrong++
		case f.wrong && bad < maxBad:
			bad, wrong = bad+1, 1
			f.fail(err) // the chunks behind it may be good
		default:
			f.abandon(err)
		}
	}
}

// attempt asks the sources for the rest of the run. It holds a buffer no longer
// than that.
func (f *fetch) attempt() error {
	h := f.v.h
	f.down, f.wrong = false, false
	if h.ctx.Err() != nil {
		return h.errClosed()
	}
	buf, err := h.s.mem.reserve(h.ctx, f.largest, f.work)
	if err != nil {
		return h.errClosed()
	}
	defer h.s.mem.release(buf)
	return f.fromAny(*buf.bytes)
}

func (f *fetch) isLocal() bool {
	f.v.seg.mu.Lock()
	defer f.v.seg.mu.Unlock()
	return f.local
}

func (f *fetch) more() bool { return f.next < f.end() }

func (f *fetch) end() int {
	f.v.seg.mu.Lock()
	defer f.v.seg.mu.Unlock()
	return f.stop
}

// fromAny asks the sources in order for the rest of the run. On error, chunk
// next is the one that none of them could give.
func (f *fetch) fromAny(buf []byte) error {
	for {
		errs, stuck := f.round(buf)
		if f.v.h.ctx.Err() != nil {
			return f.v.h.errClosed()
		}
		if !stuck && len(errs) == 0 {
			return nil
		}
		if stuck {
			f.down, f.wrong = causes(errs)
			c := f.v.seg.table.Chunks[f.next]
			return exhausted(fmt.Sprintf("chunk at %d of segment %s", c.Off, f.v.seg.id), errs)
		}
	}
}

// round asks each source once, until the run is done (no errors), all have
// failed at the same chunk (stuck), or one got further than those before it:
// these may have what it has not.
func (f *fetch) round(buf []byte) (errs []error, stuck bool) {
	for _, src := range inOrder(f.v.h.sources) {
		before := f.next
		err := f.from(src, buf)
		if err == nil {
			return nil, false
		}
		stuck := f.next == before || len(errs) == 0
		errs = append(errs, fmt.Errorf("%s: %w", src.Name(), err))
		if !stuck || f.v.h.ctx.Err() != nil {
			return errs, false
		}
	}
	return errs, true
}

// maxBlames is how often a source that knows where else to ask is asked again for one
// chunk.
const maxBlames = 8

// from asks one source, again as long as it gives chunks before it breaks off, and
// while wrong bytes lead it elsewhere.
func (f *fetch) from(src *source, buf []byte) error {
	for blames := 0; ; {
		before := f.next
		f.blamed = false
		err := f.stream(src, buf)
		if errors.Is(err, errHurry) {
			continue
		}
		if f.v.h.ctx.Err() == nil {
			src.note(err)
		}
		cut := f.next > before && errors.Is(err, io.ErrUnexpectedEOF)
		if f.next > before {
			blames = 0
		}
		if f.blamed {
			blames++
		}
		if err == nil || !cut && (!f.blamed || blames > maxBlames) {
			return err
		}
	}
}

var errStalled = fmt.Errorf("no byte arrived in time: %w", errdefs.ErrUnavailable)

// stream makes one request for the rest of the run and delivers its chunks as
// they arrive.
func (f *fetch) stream(src *source, buf []byte) error {
	ctx, cancel := context.WithCancelCause(f.ctx())
	defer cancel(nil)
	r := newWatched(f, src.stats, cancel)
	defer r.dog.Stop()

	chunks := f.v.seg.table.Chunks
	at := chunks[f.next].Off
	if err := src.mayGive(f.v.desc); err != nil {
		return err
	}
	f.asks(src, cancel)
	defer f.answered()
	src.stats.requests.Add(1)
	body, err := src.Fetch(ctx, f.v.desc, at, chunks[f.end()-1].End()-at)
	if err != nil {
		return causeOf(ctx, err)
	}
	defer func() { _ = body.Close() }() // all that counts was verified
	r.body = body
	for f.more() {
		c := chunks[f.next]
		if err := f.chunk(r, c.Off-at, buf[:c.Len]); err != nil {
			f.blame(body, err)
			return causeOf(ctx, err)
		}
		at = c.End()
	}
	return nil
}

// blame tells the body that its bytes are wrong, when that is what err says.
func (f *fetch) blame(body io.Reader, err error) {
	if b, ok := body.(Blamer); ok && errdefs.IsDataLoss(err) {
		f.blamed = b.Blame(err)
	}
}

// causeOf prefers why ctx was cancelled to how the source put it.
func causeOf(ctx context.Context, err error) error {
	if cause := context.Cause(ctx); cause != nil {
		return cause
	}
	return err
}

// chunk reads chunk next from r, which stands gap bytes before it, verifies and
// delivers it.
func (f *fetch) chunk(r io.Reader, gap int64, b []byte) error {
	if _, err := io.CopyN(io.Discard, r, gap); err != nil {
		return noEOF(err)
	}
	if _, err := io.ReadFull(r, b); err != nil {
		return noEOF(err)
	}
	if err := f.verifyNext(b); err != nil {
		return err
	}
	f.deliver(b)
	return nil
}

// verifyNext compares b with the sum of chunk next, when it is its turn to compute.
func (f *fetch) verifyNext(b []byte) error {
	leave, err := f.v.h.s.cfg.Sched.CPU().Enter(f.ctx())
	if err != nil {
		return err
	}
	defer leave()
	if err = verify(f.v.seg.table, f.next, b); err != nil {
		f.v.h.s.stats.verifyFailures.Add(1)
	}
	return err
}

// verify compares the bytes of chunk i with their sum. Vouched sums say nothing
// of bytes: stream has let only a source speak that vouches for them.
func verify(t *index.Table, i int, b []byte) error {
	c := &t.Chunks[i]
	if t.Algorithm == index.Vouched {
		return nil
	}
	if got := t.Algorithm.Sum(b); got != c.Sum {
		return fmt.Errorf("chunk at %d has digest %x, want %x: %w", c.Off, got[:6], c.Sum[:6], errdefs.ErrDataLoss)
	}
	return nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// watched counts a body's bytes and cancels the fetch when none comes in time.
// Time that the store itself takes between two reads does not count, nor does what
// the source waits for its turn.
type watched struct {
	body   io.Reader
	dog    *time.Timer
	stall  time.Duration
	stats  *sourceCounters
	work   *sched.Work
	cancel context.CancelCauseFunc
}

// newWatched is for a request that is about to be made; the body comes later.
func newWatched(f *fetch, stats *sourceCounters, cancel context.CancelCauseFunc) *watched {
	w := &watched{stall: f.v.h.s.cfg.Stall, stats: stats, work: f.work, cancel: cancel}
	w.dog = time.AfterFunc(math.MaxInt64, w.bark)
	w.dog.Reset(w.stall)
	return w
}

// bark is called when nothing has come for as long as stall.
func (w *watched) bark() {
	if w.work.Waiting() {
		w.dog.Reset(w.stall)
		return
	}
	w.cancel(errStalled)
}

func (w *watched) Read(p []byte) (int, error) {
	w.dog.Reset(w.stall)
	n, err := w.body.Read(p)
	w.dog.Stop()
	w.stats.bytes.Add(int64(n))
	return n, err
}

// deliver is the one door into the store: it keeps the verified bytes b of chunk
// next, copies them to everyone who waits and gives up the claim.
func (f *fetch) deliver(b []byte) {
	g, i := f.v.seg, f.next
	defer f.diskTurn()()
	g.filling.RLock() // what is written here is not punched
	defer g.filling.RUnlock()
	lost := g.lost.Load()
	written, err := g.keep(i, b, g.s.spare(f.work.Standing().Flow))
	g.mu.Lock()
	defer g.mu.Unlock()
	if written && g.lost.Load() == lost { // else this write may be among what was lost
		g.setPresent(i)
		g.s.known.add(g.id, g.table, i)
		g.tell()
	}
	switch kept := g.isPresent(i); { // also when it was ingested meanwhile
	case kept:
		f.hand(b, true, nil)
	case written:
		f.hand(b, false, fmt.Errorf("keep chunk %d of segment %s: %w", i, g.id, errors.Join(errdefs.ErrResourceExhausted, errUnsynced)))
	default:
		f.hand(b, false, err)
	}
}

// hand copies the bytes of chunk next to everyone who waits and goes on to the
// next one; err says why it is not kept. Precondition: segment.mu is held.
func (f *fetch) hand(b []byte, kept bool, err error) {
	g, i := f.v.seg, f.next
	given := int64(0)
	for _, w := range g.takeClaim(i).waiters {
		if w.kept && err != nil {
			w.settle(err)
			continue
		}
		if !w.r.gone {
			given += int64(copy(w.dst, b[w.skip:]))
		}
		w.settle(nil)
	}
	f.advance()
	switch {
	case kept:
	case given < int64(len(b)):
		g.s.mem.put(blockKey{g, i}, b, given)
	case g.home.Load() == nil:
		g.bits.set(i)
	}
}

// tell reports a segment that a fetch has made complete. Precondition: mu is held
// and a fetch runs, which Store.Close waits for first.
func (g *segment) tell() {
	complete := g.s.cfg.Complete
	if complete == nil || g.told || g.missing.Load() > 0 {
		return
	}
	g.told = true
	g.s.wg.Go(func() { complete(g.id) })
}

// fail gives the waiters of chunk next an error and goes on to the next one.
func (f *fetch) fail(err error) {
	g := f.v.seg
	g.mu.Lock()
	defer g.mu.Unlock()
	f.failNext(err)
}

// abandon fails all chunks that are left.
func (f *fetch) abandon(err error) {
	g := f.v.seg
	g.mu.Lock()
	defer g.mu.Unlock()
	for f.next < f.stop {
		f.failNext(err)
	}
}

// failNext fails chunk next. Readers who joined the fetch try once themselves;
// those through other handles have other sources. Precondition: segment.mu is
// held.
func (f *fetch) failNext(err error) {
	for _, w := range f.v.seg.takeClaim(f.next).waiters {
		if w.worthAgain(f) {
			w.settle(errAgain)
		} else {
			w.settle(err)
		}
	}
	f.advance()
}

// takeClaim ends the claim of chunk i. Precondition: g.mu is held.
func (g *segment) takeClaim(i int) *claim {
	c := g.claims[i]
	delete(g.claims, i)
	return c
}

// split hands the chunks from i on to a fetch of its own, for a reader who would
// otherwise wait too long. Precondition: segment.mu is held, f has claimed i and
// is not at it yet or is paused.
func (f *fetch) split(i int, v *view, by *read) *fetch {
	far := v.newFetch(i, by, f.base)
	far.stop, far.local = f.stop, f.local
	for k := i; k < f.stop; k++ {
		v.seg.claims[k].f = far
		far.largest = max(far.largest, v.seg.table.Chunks[k].Len)
	}
	f.stop = i
	f.part(far)
	return far
}
