package store

import (
	"slices"
	"sync"
	"time"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Touch is a range of an image that was read for the first time, as whole chunks.
type Touch struct {
	index.Range
	After time.Duration // from the beginning of the recording to that first read
}

// maxTouch is how long a Touch may become in bytes, so that its time says something.
const maxTouch = 1 << 20

// Recording notes which chunks of an image are read through one handle, in the order
// in which they are read first. What is fetched ahead of readers, or read unseen by
// another process ([Image.Share]), is not in it. Its methods may be called at the same
// time.
type Recording struct {
	img   *Image
	seen  map[*view]*marks // the map is immutable
	max   int              // touches
	from  time.Time
	fresh chan struct{} // has a value when chunks were read first since it was empty

	mu      sync.Mutex
	touches []Touch // protected by mu, as all below
	at      *view   // where the last one is, and the number of the chunk behind it
	next    int
	last    time.Time // when a chunk was read first
	ended   bool
	unread  int64 // bytes of the chunks that a Replay has brought and nobody has read
}

// marks says of the chunks of a segment what has happened to them.
type marks struct {
	read    bitmap
	brought bitmap // by a Replay, before they were read; protected by Recording.mu
}

// Record starts a recording of at most max touches. It ends an earlier recording of this
// handle.
func (i *Image) Record(max int) *Recording {
	r := &Recording{img: i, seen: make(map[*view]*marks, len(i.h.views)), max: max, from: time.Now(), fresh: make(chan struct{}, 1)}
	for k := range i.h.views {
		v := &i.h.views[k]
		n := len(v.seg.table.Chunks)
		r.seen[v] = &marks{read: newBitmap(n), brought: newBitmap(n)}
	}
	if old := i.h.recording.Swap(r); old != nil {
		old.end()
	}
	return r
}

// Stop ends the recording and returns what is in it: neighbours that were read one
// right after the other are one touch. Stopping twice gives the same.
func (r *Recording) Stop() []Touch {
	r.img.h.recording.CompareAndSwap(r, nil)
	return r.end()
}

// end lets nothing more into the recording and returns what is in it.
func (r *Recording) end() []Touch {
	r.mu.Lock()
	defer r.mu.Unlock()
	if !r.ended {
		r.img.h.s.stats.replayWasted.Add(r.unread)
	}
	r.ended = true
	return slices.Clone(r.touches)
}

// Last is when a chunk was read first; zero when none was.
func (r *Recording) Last() time.Time {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.last
}

// note records that [off, end) of v's segment was read. Of chunks that are in the
// recording it takes no lock.
func (r *Recording) note(v *view, off, end int64) {
	m := r.seen[v]
	from, to := v.seg.span(off, end)
	for i := from; i < to; i++ {
		if !m.read.has(i) && m.read.set(i) {
			r.add(v, i)
		}
	}
}

// add appends chunk i of v's segment, to the last touch if it is the next one there,
// behind no more zeros than a fetch reads anyway.
func (r *Recording) add(v *view, i int) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.ended {
		return
	}
	r.last = time.Now()
	r.use(v, i)
	c, n := v.seg.table.Chunks[i], len(r.touches)
	off := v.desc.Off + c.Off
	if r.at == v && r.next == i && c.Off-v.seg.table.Chunks[i-1].End() <= maxGap && off+c.Len-r.touches[n-1].Off <= maxTouch {
		r.touches[n-1].Len = off + c.Len - r.touches[n-1].Off
		r.next++
	} else if n < r.max {
		r.touches = append(r.touches, Touch{index.Range{Off: off, Len: c.Len}, r.last.Sub(r.from)})
		r.at, r.next = v, i+1
	}
}

// use counts a chunk that is read now if it was brought for that. Precondition: mu is
// held.
func (r *Recording) use(v *view, i int) {
	if r.seen[v].brought.has(i) {
		n := v.seg.table.Chunks[i].Len
		r.unread -= n
		r.img.h.s.stats.replayUsed.Add(n)
	}
	select {
	case r.fresh <- struct{}{}:
	default:
	}
}
