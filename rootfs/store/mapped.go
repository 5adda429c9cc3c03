package store

import (
	"context"
	"os"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// maxMapped is where a Mapped ends at the latest, in bytes from its beginning: the
// longer it is, the more is read in vain when it was not valid.
const maxMapped = 1 << 20

// Mapped says where bytes of an image lie in a file, for who has them sent from there
// by the kernel. It is for this process what package shared is for others:
//
//	m := img.Map(ctx, off, n)
//	// take m.N bytes at m.Off of m.File
//	if !m.Valid() { /* what was taken is worth nothing */ }
//
// The file is the store's own: not to be closed, nor used in another way than by
// offsets. It may be closed at any time, when the bytes are in another file.
//
// The kernel may have taken pages and no copy of their bytes. Such pages still have
// them after the store has given the disk back, but for a page of which another chunk
// goes: its part is overwritten with zeros. So only what lies in pages of its own is
// mapped.
type Mapped struct {
	File   *os.File
	Off, N int64 // bytes; N is 0 when there is nothing to take: read instead

	seg, target     *segment // target is nil, or has the bytes for seg
	epoch, targeted int64
}

// Map says where the bytes of [off, off+n) are, or those that come first. N is 0 when
// the first of them is not here or not in pages of its own. Of ctx only the rank
// counts, for what is read ahead.
func (i *Image) Map(ctx context.Context, off, n int64) Mapped {
	if off < i.image.record.BootSize || off >= i.size || n <= 0 {
		return Mapped{}
	}
	v := i.h.viewAt(off)
	off -= v.desc.Off
	return v.mapped(ctx, off, min(off+min(n, maxMapped), v.desc.Table.Size))
}

func (v *view) mapped(ctx context.Context, off, end int64) Mapped {
	g := v.seg
	m := Mapped{seg: g, epoch: g.epoch.Load()} // before the bits
	if end = g.presentEnd(off, end); end <= off {
		return Mapped{}
	}
	if g.ahead.marked(off, end) {
		v.readAhead(ctx, off, end)
	}
	m.Off, m.N = off, end-off
	from := g
	if l := g.links.Load(); l != nil { // loaded after the bits
		r := g.runAt(l, off, end)
		if r.zeros || r.t != nil && !m.aim(&r) {
			return Mapped{}
		}
		m.Off, m.N = r.off, r.n
		if r.t != nil {
			from = r.t
		}
	}
	h := from.home.Load() // after bits and links
	m.File, m.Off = h.file, m.Off+h.off
	v.note(off, off+m.N)
	v.h.counts.Load().hit(m.N)
	return m
}

// aim notes the target of a linked run, if that has the bytes.
func (m *Mapped) aim(r *run) bool {
	m.target, m.targeted = r.t, r.t.epoch.Load() // before the bits
	for k := range r.k {
		if !r.t.owns(r.chunk+k) || !r.t.alone(r.chunk+k) {
			return false
		}
	}
	return true
}

// Valid says whether everything that the Mapped tells was there until now.
func (m Mapped) Valid() bool {
	return m.seg.epoch.Load() == m.epoch && (m.target == nil || m.target.epoch.Load() == m.targeted)
}

// presentEnd returns up to where, from off on, all chunks are present and alone in
// their pages; end at most.
func (g *segment) presentEnd(off, end int64) int64 {
	if g.home.Load() == nil {
		return off
	}
	chunks := g.table.Chunks
	for i := g.table.Find(off); i < len(chunks) && chunks[i].Off < end; i++ {
		if !g.bits.has(i) || !g.alone(i) {
			return min(end, chunks[i].Off)
		}
	}
	return end
}

// alone says whether no page that has bytes of chunk i has bytes of the next one.
func (g *segment) alone(i int) bool {
	chunks := g.table.Chunks
	return chunks[i].Off%index.BlockSize == 0 && (i+1 == len(chunks) || chunks[i+1].Off%index.BlockSize == 0)
}
