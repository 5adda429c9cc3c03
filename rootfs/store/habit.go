package store

// habit learns how much of what lies around the bytes that were asked for is read soon
// after them, in a store that keeps nothing: what it fetches in vain it fetches again.
// By that it says how much to fetch next: all around for one who goes through files in
// about the order of the layer, nothing else for one who jumps about in a large image.
// It has no clock and no lock; offsets are those of one segment.
type habit struct {
	recent [stretches]stretch // a ring
	next   int                // where the next one goes
	useful int64              // share of stretches that is read, in 1/habitOne
}

// stretch is a part of a segment that a window was for, or would have been.
type stretch struct {
	lo, hi int64 // empty: none
	read   int64 // bytes of it that were read since
}

const (
	// stretches is for how many windows it is noted what is read of them: about as
	// many as have room in the memory of a store without Keep.
	stretches = 8
	// habitOne is everything.
	habitOne = 1024
	// habitWeight is how many stretches count, roughly; earlier ones are forgotten.
	habitWeight = 4
)

// dense is how useful stretches are to one who reads everything, nearly in order; below
// sparse it is cheaper to fetch again what is asked for after all. One file in a MiB is
// well below that.
const (
	dense  = habitOne * 7 / 8
	sparse = habitOne / 8
)

// begin notes that a window was opened, and draws the conclusion from an early one.
func (h *habit) begin(lo, hi int64) {
	if old := &h.recent[h.next]; old.hi > old.lo {
		share := min(habitOne*old.read/(old.hi-old.lo), habitOne)
		h.useful += (share - h.useful) / habitWeight
	}
	h.recent[h.next] = stretch{lo: lo, hi: hi}
	h.next = (h.next + 1) % stretches
}

// at returns the youngest stretch that off lies in, or nil.
func (h *habit) at(off int64) *stretch {
	for k := range stretches {
		s := &h.recent[(h.next+stretches-1-k)%stretches]
		if s.lo <= off && off < s.hi {
			return s
		}
	}
	return nil
}

// saw notes that n bytes at off were read. Who reads them again counts once more, but
// rarely comes here: the page cache has them.
func (h *habit) saw(off, n int64) {
	if s := h.at(off); s != nil {
		s.read += n
	}
}

// window is how many bytes to fetch around those that were asked for, between 0 and
// most; first is the usual.
func (h *habit) window(first, most int64) int64 {
	switch {
	case h.useful >= dense:
		return most
	case h.useful >= sparse:
		return first
	}
	return 0
}
