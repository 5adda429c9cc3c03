package store

import "sync/atomic"

// readahead recognises sequential reads of a segment. A demand read that misses
// where an earlier window ended continues that window's stream with a larger
// one. A mark is then left where its reader comes next: a read that touches it,
// hit or miss, starts the next window at once and moves the mark to that
// window's start. So one window is always on its way behind the one being read.
type readahead struct {
	marks   [streams]atomic.Int64 // offset in the segment; 0 is none
	streams [streams]stream       // protected by segment.mu, as clock
	clock   int64
}

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
func (a *readahead) window(off, end, first, limit int64) (lo, hi int64) {
	a.clock++
	oldest := 0
	for i := range a.streams {
		s := &a.streams[i]
		if s.size > 0 && off >= s.end && off-s.end <= first/4 {
			lo, s.size = s.end, min(2*s.size, limit)
			s.end, s.used = max(lo+s.size, end), a.clock
			a.marks[i].Store(min(end, s.end-1))
			return lo, s.end
		}
		if s.used < a.streams[oldest].used {
			oldest = i
		}
	}
	lo = off - off%max(first/4, 1)
	hi = max(lo+first, end)
	a.streams[oldest] = stream{end: hi, size: first, used: a.clock}
	a.marks[oldest].Store(0)
	return lo, hi
}

// readAhead starts the window after the mark that a read of [off, end) touches.
func (v *view) readAhead(off, end int64) {
	v.seg.mu.Lock()
	fetches := v.nextWindow(off, end)
	v.seg.mu.Unlock()
	v.h.start(fetches)
}

// nextWindow claims the next windows of the streams whose marks lie in
// [off, end). Precondition: segment.mu is held.
func (v *view) nextWindow(off, end int64) []*fetch {
	var out []*fetch
	a, s := &v.seg.ahead, v.h.s
	for i := range a.marks {
		m, st := a.marks[i].Load(), &a.streams[i]
		if m == 0 || m < off || m >= end {
			continue
		}
		size := min(2*st.size, s.cfg.MaxWindow)
		if st.end >= v.seg.table.Size || !s.roomAhead(size) {
			a.marks[i].Store(0) // the stream goes on when its reader misses
			continue
		}
		from, to := v.seg.span(st.end, st.end+size)
		a.marks[i].Store(st.end)
		a.clock++
		st.end, st.size, st.used = st.end+size, size, a.clock
		for _, f := range v.claim(from, to, s.cfg.MaxWindow, nil) {
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
