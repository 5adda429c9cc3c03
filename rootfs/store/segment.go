package store

import (
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store/shared"
)

// segment is the state of one open segment, shared by all who read it.
type segment struct {
	s       *Store
	id      index.ID
	table   *index.Table // immutable
	refs    int          // who has it open, links of others included; protected by Store.mu
	users   int          // those of them who read it, so that links are needed; protected by Store.mu
	retired bool         // it was to be removed, but was open; protected by Store.mu

	// bits has one bit for each chunk. With a home: it is present there or linked.
	// Without: it has been handed out completely, see the package comment.
	bits     bitmap
	missing  atomic.Int64          // bytes of the chunks that are not present
	home     atomic.Pointer[home]  // where present chunks are; nil without Keep
	links    atomic.Pointer[links] // which chunks are elsewhere; nil when none ever was
	relinked atomic.Bool           // links were changed since they were written
	dirty    atomic.Bool           // bits were set since the last flush
	epoch    atomic.Int64          // how often present bytes went or moved to a link; changes with mu held
	lost     atomic.Int64          // how often bytes of home went, or may have, as when a sync failed; changes with mu held
	flushMu  sync.Mutex            // one flush, or one change of home, at a time
	durable  bitmap                // chunks whose bytes in home survived a sync; protected by flushMu
	state    *shared.State         // tells other processes what is in home; nil when none has asked; changes with flushMu and mu held
	use      *use                  // what its file takes of the disk; nil without Keep; immutable
	filling  sync.RWMutex          // held for reading while a fetch writes a chunk and marks it, for writing while chunks that may be fetched go

	mu     sync.Mutex
	claims map[int]*claim // chunks being fetched, protected by mu
	ahead  readahead      // its marks are atomic, the rest protected by mu
	told   bool           // Config.Complete was called, protected by mu
}

// home is the file that has a segment's bytes.
type home struct {
	file *os.File
	off  int64 // of the segment in the file
	own  bool  // the file is the segment's own and has a bitmap beside it
}

func newSegment(s *Store, id index.ID, t *index.Table) *segment {
	g := &segment{s: s, id: id, table: t, bits: newBitmap(len(t.Chunks)), durable: newBitmap(len(t.Chunks)), claims: map[int]*claim{}, ahead: newReadahead()}
	for _, c := range t.Chunks {
		g.missing.Add(c.Len)
	}
	return g
}

// span returns the numbers [from, to) of the chunks that touch [off, end).
func (g *segment) span(off, end int64) (from, to int) {
	from = g.table.Find(off)
	to = from
	for to < len(g.table.Chunks) && g.table.Chunks[to].Off < end {
		to++
	}
	return from, to
}

// present says whether all chunks that touch [off, end) can be read from home.
// It takes no lock.
func (g *segment) present(off, end int64) bool {
	if g.home.Load() == nil {
		return false
	}
	chunks := g.table.Chunks
	for i := g.table.Find(off); i < len(chunks) && chunks[i].Off < end; i++ {
		if !g.bits.has(i) {
			return false
		}
	}
	return true
}

// pread reads from home and from where links lead. Precondition: what
// [off, off+len(p)) touches is present. It fails with errAgain when it is not any
// more.
func (g *segment) pread(p []byte, off int64) error {
	if l := g.links.Load(); l != nil { // loaded after the bits
		return g.readLinked(l, p, off)
	}
	return g.readHome(p, off)
}

// readHome reads from home. Precondition: what [off, off+len(p)) touches is
// there. The home is loaded after the bits and links were, because a segment moves
// house by changing first the home and then these.
func (g *segment) readHome(p []byte, off int64) error {
	for {
		h := g.home.Load()
		n, err := h.file.ReadAt(p, h.off+off)
		if n == len(p) {
			return nil
		}
		if errors.Is(err, os.ErrClosed) {
			if g.home.Load() != h {
				continue // moved between the two lines
			}
			return fmt.Errorf("read kept segment %s: %w", g.id, err)
		}
		return fmt.Errorf("read kept segment %s at %d: %w", g.id, off, errors.Join(errdefs.ErrDataLoss, err))
	}
}

// keep writes a verified chunk to the segment's home and reports whether it has. spare
// says that the class that yields wants it. It is called without locks, by the one
// fetch that has claimed the chunk.
func (g *segment) keep(i int, b []byte, spare bool) (bool, error) {
	h := g.home.Load()
	if h == nil {
		return false, nil
	}
	if g.bits.has(i) { // ingested meanwhile
		return false, nil
	}
	if !h.own { // the disk has ruined a complete image, which is not written again
		return false, nil
	}
	err := g.s.admit(int64(len(b)), spare)
	if err == nil {
		_, err = h.file.WriteAt(b, h.off+g.table.Chunks[i].Off)
	}
	if err != nil {
		g.s.full(err, spare)
		g.s.stats.keepFailures.Add(1)
		g.s.stats.keepLogged.Do(func() {
			g.s.log.Warn("chunks cannot be kept and will be fetched again; make room", "dir", g.s.cfg.Dir, "err", err)
		})
		return false, fmt.Errorf("keep chunk %d of segment %s: %w", i, g.id, errors.Join(errdefs.ErrResourceExhausted, err))
	}
	g.s.usage.add(g.use, int64(len(b)))
	g.s.checkRoom(spare)
	return true, nil
}

// moveTo makes h the home of the segment, which has there the chunks of have, or
// all when that is nil, and no others; synced says that it has them on disk.
// Precondition: flushMu is held.
func (g *segment) moveTo(h *home, have bitmap, synced bool) {
	g.mu.Lock()
	state := g.takeState((*shared.State).Move) // whatever becomes of the old file is not seen any more
	old, l := g.home.Swap(h), g.links.Load()
	for i := range g.table.Chunks {
		if have != nil && !have.has(i) {
			continue
		}
		if l != nil && l.at[i].Swap(0) != 0 {
			g.relinked.Store(true)
		}
		g.setPresent(i)
		g.durable.clear(i) // what was synced was the old file
		if synced {
			g.durable.set(i)
		}
	}
	g.mu.Unlock()
	g.closeState(state)
	if old != nil {
		_ = old.file.Close() // its bytes are in h; readers of the moment try again
	}
	g.account()
}

// close releases the segment's file. Precondition: Store.mu is held and nobody reads
// it.
func (g *segment) close() {
	g.flush()
	g.endState()
	g.s.mem.forget(g)
	if h := g.home.Load(); h != nil {
		_ = h.file.Close() // flush has synced it or said that it could not
	}
}
