package store

import (
	"context"
	"sync/atomic"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// readahead recognises sequential reads of a segment. A demand read that misses
// where an earlier window ended continues that window's stream with a larger
// one. A mark is then left where its reader comes next: a read that touches it,
// hit or miss, starts the next window at once and moves the mark to that
// window's start. So one window is always on its way behind the one being read.
//
// In a store without Keep, how much of earlier windows was read decides how large the
// next ones are ([habit]). One with Keep loses nothing by what it fetches too early.
type readahead struct {
	marks   [streams]atomic.Int64 // offset in the segment; 0 is none
	streams [streams]stream       // protected by segment.mu, as all below
	clock   int64
	habit   habit
}

// newReadahead knows nothing of its readers, and gives them the benefit of the doubt.
func newReadahead() readahead { return readahead{habit: habit{useful: sparse}} }

// streams is how many sequential readers of a segment are told apart.
const streams = 4

type stream struct {
	end  int64 // of what was fetched for it, offset in the segment
	size int64 // of its last window in bytes, 0 when unused
	used int64 // clock
}

// marked says whether a read of [off, end) touches a mark. It takes no lock.
func (a *readahead) marked(off, end int64) bool {
	for i := range a.marks {
		if m := a.marks[i].Load(); m != 0 && off <= m && m < end {
			return true
		}
	}
	return false
}

// window returns what to fetch, [lo, hi), for a demand read up to end that
// misses the chunk at off. Precondition: segment.mu is held.
func (a *readahead) window(off, end int64, c *Config) (lo, hi int64) {
	a.clock++
	oldest := 0
	for i := range a.streams {
		s := &a.streams[i]
		if s.size > 0 && off >= s.end && off-s.end <= c.Window/4 {
			lo, s.size = s.end, min(2*s.size, a.most(c))
			s.end, s.used = max(lo+s.size, end), a.clock
			a.marks[i].Store(min(end, s.end-1))
			a.habit.begin(lo, s.end)
			return lo, s.end
		}
		if s.used < a.streams[oldest].used {
			oldest = i
		}
	}
	lo, hi = a.jump(off, end, c)
	a.streams[oldest] = stream{end: hi, size: hi - lo, used: a.clock}
	a.marks[oldest].Store(0)
	return lo, hi
}

// jump is window for a read that continues no stream.
func (a *readahead) jump(off, end int64, c *Config) (lo, hi int64) {
	size := c.Window
	if !c.Keep {
		size = a.habit.window(c.Window, c.MaxWindow)
	}
	if size == 0 {
		if a.habit.at(off) == nil { // else it is one more read of a window that was none
			a.habit.begin(off, max(off+c.Window, end))
		}
		return off, end
	}
	lo = off - off%max(c.Window/4, 1)
	hi = max(lo+size, end)
	a.habit.begin(lo, hi)
	return lo, hi
}

// most is how large the windows of streams become. A directory's files come in
// stretches of the layer: few of those who seem to read on do so for MiBs.
func (a *readahead) most(c *Config) int64 {
	if c.Keep || a.habit.useful >= dense {
		return c.MaxWindow
	}
	return min(2*c.Window, c.MaxWindow)
}

// readAhead starts the window after the mark that a read of [off, end) touches.
func (v *view) readAhead(ctx context.Context, off, end int64) {
	rank := sched.RankOf(ctx)
	v.seg.mu.Lock()
	fetches := v.nextWindow(off, end, rank)
	v.seg.mu.Unlock()
	v.h.start(fetches)
}

// nextWindow claims the next windows of the streams whose marks lie in
// [off, end), which a read of this rank touches. Precondition: segment.mu is held.
func (v *view) nextWindow(off, end int64, rank sched.Rank) []*fetch {
	var out []*fetch
	a, s := &v.seg.ahead, v.h.s
	for i := range a.marks {
		m, st := a.marks[i].Load(), &a.streams[i]
		if m == 0 || m < off || m >= end {
			continue
		}
		size := min(2*st.size, a.most(&s.cfg))
		if st.end >= v.seg.table.Size || !s.roomAhead(size) {
			a.marks[i].Store(0) // the stream goes on when its reader misses
			continue
		}
		from, to := v.seg.span(st.end, st.end+size)
		a.habit.begin(st.end, min(st.end+size, v.seg.table.Size))
		a.marks[i].Store(st.end)
		a.clock++
		st.end, st.size, st.used = st.end+size, size, a.clock
		for _, f := range v.claim(from, to, s.cfg.MaxWindow, nil, max(rank, sched.Prefetch)) {
			f.ahead = v.seg.distance(f.next, f.stop-1)
			s.stats.ahead.Add(f.ahead)
			out = append(out, f)
		}
	}
	return out
}

// roomAhead bounds the readahead of all streams together to half of the memory,
// so that demand reads find room and, without Keep, chunks are not dropped
// before they are read.
func (s *Store) roomAhead(n int64) bool { return s.stats.ahead.Load()+n <= s.cfg.Memory/2 }
