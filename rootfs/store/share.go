package store

import (
	"errors"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// elsewhere says whether chunk i of g is probably in the store already. It is a
// look into memory; link finds out whether it is true.
func (g *segment) elsewhere(i int) bool {
	_, _, ok := g.s.known.find(g.id, g.table, i)
	return ok
}

// link links the chunks of the run to where they are in the store already. When
// one is not what it should be there, only that one is left to the sources; when
// it is not there at all, so is the rest of the run.
func (f *fetch) link() {
	h := f.v.h
	buf, err := h.s.mem.reserve(h.ctx, f.largest, f.work)
	if err != nil {
		return // as the attempt to come will find
	}
	defer h.s.mem.release(buf)
	for f.more() && h.ctx.Err() == nil && err == nil {
		err = f.linkNext(*buf.bytes)
	}
	g := f.v.seg
	g.mu.Lock()
	f.local = false
	var rest *fetch
	if errdefs.IsDataLoss(err) && f.next+1 < f.stop {
		rest = f.split(f.next+1, f.v, f.by)
		rest.local = true
	}
	g.mu.Unlock()
	if rest != nil {
		h.start([]*fetch{rest})
	}
}

// linkNext links chunk next and delivers it.
func (f *fetch) linkNext(buf []byte) error {
	g, i := f.v.seg, f.next
	n, j, err := g.locate(i, buf)
	if err != nil {
		return err
	}
	return g.borrow(g.links.Load().target(n), j, func() {
		if !g.bits.has(i) { // else ingested meanwhile
			g.setLink(i, n, j)
			g.tell()
		}
		f.hand(buf[:g.table.Chunks[i].Len], true, nil)
	})
}

// locate finds an equal chunk in the store and reads its bytes into buf: chunk j
// of target n. They are compared with the sum, so that rot on the disk does not
// spread: with ErrDataLoss the target has lost the chunk. It takes Store.mu.
func (g *segment) locate(i int, buf []byte) (n, j int, err error) {
	id, j, ok := g.s.known.find(g.id, g.table, i)
	if !ok {
		return 0, 0, errdefs.ErrNotFound
	}
	n, err = g.target(id)
	if err == nil {
		err = g.links.Load().target(n).copyOut(g, i, j, buf)
	}
	if err != nil {
		g.s.known.forgetAt(g.table, i, id, j)
	}
	return n, j, err
}

// copyOut reads chunk j of t, which should be chunk i of g, and verifies it.
func (t *segment) copyOut(g *segment, i, j int, buf []byte) error {
	if !sameChunk(g.table, i, t.table, j) {
		return fmt.Errorf("chunk %d of segment %s is another: %w", j, t.id, errdefs.ErrNotFound)
	}
	c := t.table.Chunks[j]
	epoch := t.epoch.Load() // before the bit
	if !t.owns(j) {
		return fmt.Errorf("chunk %d of segment %s is gone: %w", j, t.id, errdefs.ErrNotFound)
	}
	err := t.readHome(buf[:c.Len], c.Off)
	if err == nil {
		err = verify(t.table, j, buf[:c.Len])
	}
	if err == nil {
		return nil
	}
	if t.epoch.Load() != epoch {
		return fmt.Errorf("chunk %d of segment %s went meanwhile: %w", j, t.id, errdefs.ErrNotFound)
	}
	t.lose(j, err)
	return errors.Join(errdefs.ErrDataLoss, err)
}

// lose makes chunk i, whose bytes on the disk are wrong, absent.
func (g *segment) lose(i int, err error) {
	g.flushMu.Lock()
	defer g.flushMu.Unlock()
	g.mu.Lock()
	defer g.mu.Unlock()
	if !g.owns(i) {
		return
	}
	g.setAbsent(i)
	g.durable.clear(i)
	g.lost.Add(1)
	g.nextEpoch()
	g.dirty.Store(true)
	g.s.stats.verifyFailures.Add(1)
	g.s.log.Error("disk gave wrong bytes; they are fetched again", "segment", g.id, "dir", g.s.cfg.Dir, "err", err)
}

// swap is a chunk of a segment that is to be read from a target instead.
type swap struct{ chunk, target, at int }

// share links the chunks of a segment that has just been ingested to where the
// store has them already, gives their disk back, and makes the others known.
func (g *segment) share() {
	swaps := g.findSwaps()
	if len(swaps) == 0 {
		return
	}
	for _, t := range *g.links.Load().targets.Load() {
		t.flush() // a chunk on disk is not given up for one that is not
	}
	g.s.mu.Lock()
	g.flushMu.Lock()
	defer g.flushMu.Unlock()
	gone, durable, err := g.swapUnlent(swaps)
	g.s.mu.Unlock()
	if err != nil {
		g.s.log.Warn("chunks that the store has twice stay so", "segment", g.id, "err", err)
		return
	}
	if durable { // the bits on disk must not speak of bytes that go
		if err := g.flushBits(); err != nil {
			g.s.log.Warn("chunks that the store has twice stay so", "segment", g.id, "err", err)
			return
		}
	}
	g.punch(gone)
}

func (g *segment) findSwaps() []swap {
	var out []swap
	var buf []byte
	for i := range g.table.Chunks {
		if g.s.ctx.Err() != nil {
			break
		}
		if !g.elsewhere(i) {
			g.s.known.add(g.id, g.table, i)
			continue
		}
		if n := g.table.Chunks[i].Len; int64(len(buf)) < n {
			buf = make([]byte, n)
		}
		if n, j, err := g.locate(i, buf); err != nil {
			g.s.known.add(g.id, g.table, i)
		} else {
			out = append(out, swap{chunk: i, target: n, at: j})
		}
	}
	return out
}

// swapUnlent does swapAll for the chunks that no other segment reads from this one.
// Precondition: Store.mu and flushMu are held.
func (g *segment) swapUnlent(swaps []swap) (gone bitmap, durable bool, err error) {
	s := g.s
	s.setLeaving(map[index.ID]bool{g.id: true})
	defer s.setLeaving(nil)
	stay := s.used("")
	maps.Copy(stay, s.ingested)
	need, err := s.needed(stay)
	if err != nil {
		return nil, false, err
	}
	lent := map[int]bool{}
	for _, i := range need[g.id] {
		lent[i] = true
	}
	gone, durable = g.swapAll(slices.DeleteFunc(swaps, func(w swap) bool { return lent[w.chunk] }))
	return gone, durable, nil
}

// swapAll turns own chunks into linked ones. It returns those, and whether any of
// them may have its bit on disk. Precondition: flushMu is held.
func (g *segment) swapAll(swaps []swap) (gone bitmap, durable bool) {
	gone = newBitmap(len(g.table.Chunks))
	for _, w := range swaps {
		t := g.links.Load().target(w.target)
		_ = g.borrow(t, w.at, func() { // or it stays where it is
			was := g.durable.has(w.chunk)
			if !g.owns(w.chunk) || !g.home.Load().own || was && !t.durable.has(w.at) {
				return
			}
			g.setLink(w.chunk, w.target, w.at)
			durable = durable || was
			g.durable.clear(w.chunk)
			gone.set(w.chunk)
		})
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	g.lost.Add(1)
	g.nextEpoch() // readers of these bytes in the own file read again
	return gone, durable
}

// punch gives back the disk of chunks that the segment's own file no longer needs,
// with the padding behind them. A filesystem that cannot keeps them.
// Precondition: flushMu is held, and none of the chunks is owned or being fetched:
// they are linked, which only a holder of flushMu ends, or nobody uses the segment.
func (g *segment) punch(gone bitmap) {
	defer g.account()
	chunks, h := g.table.Chunks, g.home.Load()
	for i := 0; i < len(chunks); i++ {
		if !gone.has(i) {
			continue
		}
		off := chunks[i].Off
		for i+1 < len(chunks) && gone.has(i+1) {
			i++
		}
		end := g.table.Size
		if i+1 < len(chunks) {
			end = chunks[i+1].Off
		}
		end = min(end, index.RoundUp(chunks[i].End()))
		if err := unix.Fallocate(int(h.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, off, end-off); err != nil {
			g.s.log.Warn("disk cannot be given back", "segment", g.id, "err", err)
			return
		}
	}
}

// scan makes known what the segments on disk have. It runs beside everything else.
func (s *Store) scan() {
	defer close(s.scanned) // for tests
	found, err := stems(s.dir.segments())
	if err != nil {
		s.log.Warn("chunks on disk are not found again", "err", err)
		return
	}
	for stem := range found {
		if s.ctx.Err() != nil || s.known.full() {
			return
		}
		s.learn(digest.NewDigestFromEncoded(digest.SHA256, stem))
	}
}

// learn makes known what one segment has. It does not open it, which would be in
// the way of Remove; an entry that is wrong when it is made is harmless.
func (s *Store) learn(id index.ID) {
	t, has := s.look(id)
	if t == nil {
		return
	}
	for i := range t.Chunks {
		if has(i) {
			s.known.add(id, t, i)
		}
	}
}

// look returns a segment's table and which chunks it has itself, or nothing when
// that cannot be told.
func (s *Store) look(id index.ID) (t *index.Table, has func(i int) bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if g := s.segments[id]; g != nil {
		return g.table, g.owns
	}
	t, err := s.loadTable(id)
	if err != nil {
		return nil, nil
	}
	if s.hasAny(id, homeFile) {
		return t, func(int) bool { return true }
	}
	bits, err := readBits(s.dir.segment(id, bitsFile), len(t.Chunks))
	if err != nil {
		return nil, nil
	}
	return t, bits.has
}
