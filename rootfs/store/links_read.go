package store

// run is a range of a segment that one pread gives.
type run struct {
	n        int64 // bytes
	zeros    bool  // no chunk covers it
	first, k int   // chunks, if not zeros: the first and how many
	t        *segment
	chunk    int   // of the target, for the first one; if t is not nil
	off      int64 // in the segment that has the bytes
}

// readLinked reads like pread where chunks may be linked. It allocates nothing.
func (g *segment) readLinked(l *links, p []byte, off int64) error {
	for end := off + int64(len(p)); off < end; {
		r := g.runAt(l, off, end)
		var err error
		switch b := p[:r.n]; {
		case r.zeros:
			clear(b)
		case r.t == nil:
			err = g.readHome(b, r.off)
		default:
			err = g.follow(&r, b)
		}
		if err != nil {
			return err
		}
		p, off = p[r.n:], off+r.n
	}
	return nil
}

// runAt returns the run that begins at off and ends at end at the latest. Gaps
// between chunks are zeros in a segment's file, so a run goes over them where the
// chunks on both sides lie in one file as they do in the segment.
func (g *segment) runAt(l *links, off, end int64) run {
	chunks := g.table.Chunks
	i := g.table.Find(off)
	if i == len(chunks) || chunks[i].Off > off {
		if i < len(chunks) {
			end = min(end, chunks[i].Off)
		}
		return run{n: end - off, zeros: true}
	}
	r := run{first: i, k: 1, off: off}
	if r.t, r.chunk = l.get(i); r.t != nil {
		r.off += r.t.table.Chunks[r.chunk].Off - chunks[i].Off
	}
	for next := i + 1; next < len(chunks) && chunks[next].Off < end && r.goesOn(g, l, next); next++ {
		r.k++
	}
	r.n = min(chunks[i+r.k-1].End(), end) - off
	return r
}

// goesOn says whether chunk next of g, the one behind the run, lies behind it in
// the file too.
func (r *run) goesOn(g *segment, l *links, next int) bool {
	t, j := l.get(next)
	if t != r.t || t == nil {
		return t == r.t
	}
	a, b := g.table.Chunks, t.table.Chunks
	return j == r.chunk+r.k && b[j].Off-b[r.chunk].Off == a[next].Off-a[r.first].Off
}

// follow reads a run from its target. It fails with errAgain when the target has
// lost one of the chunks, after making that absent.
func (g *segment) follow(r *run, b []byte) error {
	for {
		epoch := r.t.epoch.Load() // before the bits
		for k := range r.k {
			if !r.t.owns(r.chunk + k) {
				g.unlink(r.first+k, r.t, r.chunk+k)
				return errAgain
			}
		}
		if err := r.t.readHome(b, r.off); err != nil {
			return err
		}
		if r.t.epoch.Load() == epoch {
			return nil
		}
	}
}
