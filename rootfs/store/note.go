package store

import "time"

// newRead has a bit for each extent of the segment, nil without Keep.
func (g *segment) newRead() bitmap {
	if g.use == nil {
		return nil
	}
	return newBitmap(len(g.use.extents))
}

// note remembers that [off, end) of the segment was read through this view. It takes
// no lock, but for the first reads of what is recorded. Precondition: the range is not
// empty.
func (v *view) note(off, end int64) {
	if r := v.h.recording.Load(); r != nil {
		r.note(v, off, end)
	}
	v.noteExtents(off, end)
}

func (v *view) noteExtents(off, end int64) {
	if v.read == nil {
		return
	}
	size := v.h.s.usage.extent
	for e := int(off / size); e <= int((end-1)/size); e++ {
		if !v.read.has(e) {
			v.read.set(e)
		}
	}
}

// noteAll is for what is read unseen.
func (v *view) noteAll() {
	if v.read != nil {
		v.noteExtents(0, v.seg.table.Size)
	}
}

// noteUse tells, when h is closed, what was read through it: that is one use,
// however often it was read.
func (h *handle) noteUse() {
	now, spare := uint32(time.Now().Unix()), h.spare()
	for k := range h.views {
		v := &h.views[k]
		if v.read == nil || v.read.empty() {
			continue
		}
		h.s.usage.touch(v.seg.id, v.seg.use, v.read, now, spare)
		v.noteLinked(now, spare)
	}
}

// noteLinked tells the targets of links that what leads to them was read.
func (v *view) noteLinked(now uint32, spare bool) {
	l, u := v.seg.links.Load(), v.h.s.usage
	if l == nil {
		return
	}
	reads := map[*segment]bitmap{}
	for i, c := range v.seg.table.Chunks {
		if t, j := l.get(i); t != nil && v.read.has(int(c.Off/u.extent)) {
			if reads[t] == nil {
				reads[t] = t.newRead()
			}
			reads[t].set(int(t.table.Chunks[j].Off / u.extent))
		}
	}
	for t, read := range reads {
		u.touch(t.id, t.use, read, now, spare)
	}
}
