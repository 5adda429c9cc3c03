package store

import "github.com/tatami-containers/tatami/rootfs/sched"

// claim is the right and the duty of one fetch to bring one chunk.
type claim struct {
	f       *fetch // changes when the fetch is split
	waiters []waiter
}

// maxGap is how many zero bytes between two chunks a fetch reads and throws
// away rather than becoming two.
const maxGap = 64 << 10

// isPresent says whether chunk i can be read from home.
func (g *segment) isPresent(i int) bool { return g.home.Load() != nil && g.bits.has(i) }

// takeFromMemory serves w from the chunks that wait in memory for a reader.
// Precondition: g.mu is held.
func (g *segment) takeFromMemory(i int, w waiter) bool {
	ok, spent := g.s.mem.take(blockKey{g, i}, w.dst, w.skip)
	if spent && g.home.Load() == nil {
		g.bits.set(i)
	}
	return ok
}

// wanted says whether a window should bring chunk i: it is neither present (or,
// without Keep, delivered), nor waiting in memory, nor being fetched.
// Precondition: g.mu is held.
func (g *segment) wanted(i int) bool {
	return !g.bits.has(i) && g.claims[i] == nil && !g.s.mem.has(blockKey{g, i})
}

// distance is how many bytes a fetch that is about to read chunk i has to read
// before it comes to chunk j; negative when it is past it.
func (g *segment) distance(i, j int) int64 {
	return g.table.Chunks[j].Off - g.table.Chunks[min(i, len(g.table.Chunks)-1)].Off
}

// claim claims the wanted chunks in [from, to) and returns the fetches that are
// to bring them, each at most limit bytes long or a single chunk, and of this rank
// while nobody waits. Chunks that the store has elsewhere get fetches of their own:
// they wait for no source. Precondition: g.mu is held.
func (v *view) claim(from, to int, limit int64, by *read, rank sched.Rank) []*fetch {
	var out []*fetch
	var f *fetch
	g, chunks := v.seg, v.seg.table.Chunks
	for i := from; i < to; i++ {
		if !g.wanted(i) {
			f = nil
			continue
		}
		c, local := chunks[i], g.elsewhere(i)
		if f == nil || f.local != local || c.Off-chunks[i-1].End() > maxGap || c.End()-chunks[f.next].Off > limit {
			f = v.newFetch(i, by, v.h.standing(rank))
			f.local = local
			out = append(out, f)
		}
		f.stop = i + 1
		f.largest = max(f.largest, c.Len)
		g.claims[i] = &claim{f: f}
	}
	return out
}

// claimWindow claims chunk i, which a demand read up to the offset end is about
// to wait for, and the window around it. Precondition: g.mu is held and chunk i
// is not claimed, present or in memory.
func (v *view) claimWindow(i int, end int64, by *read) []*fetch {
	g, cfg := v.seg, &v.h.s.cfg
	lo, hi := g.ahead.window(g.table.Chunks[i].Off, end, cfg)
	from, to := g.span(lo, max(hi, end))
	for from < i && g.table.Chunks[from].Off < lo {
		from++ // a chunk that reaches into the window belongs to the one before
	}
	if g.bits.has(i) { // delivered once: the page cache has lost it, and likely its neighbours
		for k := from; k < to; k++ {
			g.bits.clear(k)
		}
	}
	return v.claim(from, to, max(hi-lo, cfg.MaxWindow), by, max(by.rank, sched.Prefetch))
}
