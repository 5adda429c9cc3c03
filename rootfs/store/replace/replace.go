// Package replace decides which parts of a cache make way. It is pure: it knows
// extents and a clock, no files, no locks and no time of day.
//
// It is a segmented LRU over uses. A use is what one container does with an image
// from its start to its end: however often it reads an extent, that counts once,
// when it ends. An extent that two uses have read is protected: it goes after all
// others, however recent these are. So what a scan brings, which nothing reads
// twice, makes way for itself. Uses of class batch protect nothing, and what only
// they have read goes first of all.
//
//	level      read by                      goes
//	Spare      nobody, or batch uses only   first, least recently used first
//	Probation  one use                      second, likewise
//	Protected  two or more uses             last, likewise
//
// Protected extents take at most [ProtectedShare] of the cache; beyond it, the least
// recently used ones are on probation again. An extent that went is remembered for as
// long as what went after it would have fitted into the cache: when it comes back in
// this time, it is as if it had never gone, so a set that is used steadily gets
// protected even when a stream of others pushes it out between two uses.
package replace

import (
	"cmp"
	"slices"
)

// Level is how much an extent is worth keeping.
type Level uint8

// Levels, in the order in which extents go.
const (
	Spare Level = iota
	Probation
	Protected
)

// ProtectedShare is the most that protected extents may take of a cache, per cent.
const ProtectedShare = 80

// Extent is a part of a cache. The zero value has nothing and was never used.
type Extent struct {
	Bytes int64  // in the cache
	Last  uint32 // when a use of it ended last, by any clock that does not go back; 0 is never
	Gone  uint32 // Clock.Gone when it went; 0: it has not gone since it was used
	Level Level
}

// Clock counts what a cache has given up.
type Clock struct {
	Capacity int64 // of the cache in bytes
	gone     int64 // bytes, all together
}

// unit is what Extent.Gone counts in, in bytes.
const unit = 1 << 20

func (c *Clock) now() uint32 { return uint32(c.gone/unit) + 1 }

// Use says that a use which has read e ended at the time now.
func (c *Clock) Use(e *Extent, now uint32, batch bool) {
	if e.Gone != 0 && int64(c.now()-e.Gone)*unit > c.Capacity {
		e.Level = Spare // forgotten
	}
	e.Gone = 0
	switch {
	case !batch:
		e.Level = min(e.Level+1, Protected)
	case e.Level > Spare:
		return // neither better nor worse for those who are no batch
	}
	e.Last = max(e.Last, now)
}

// Evict says that the cache has given e up.
func (c *Clock) Evict(e *Extent) {
	c.gone += e.Bytes
	e.Bytes, e.Gone, e.Level = 0, c.now(), min(e.Level, Probation)
}

// Candidate is an extent that may go, by whatever name the caller has for it.
type Candidate[K any] struct {
	Extent
	Key  K
	Open bool // somebody is about to read it: it goes after the others of its level
}

// Pick chooses what goes of all so that need bytes become free, or as much as there
// is, in the order in which it should go. elsewhere is how many bytes of
// protected extents are not among all because they may not go at present. It sorts
// all.
func Pick[K any](all []Candidate[K], capacity, elsewhere, need int64) []Candidate[K] {
	demote(all, capacity/100*ProtectedShare-elsewhere)
	slices.SortStableFunc(all, func(a, b Candidate[K]) int {
		return cmp.Or(cmp.Compare(a.Level, b.Level), later(a.Open, b.Open), cmp.Compare(a.Last, b.Last))
	})
	n := 0
	for ; n < len(all) && need > 0; n++ {
		need -= all[n].Bytes
	}
	return all[:n]
}

// demote puts on probation what of the protected extents does not fit into room
// bytes, the least recently used first.
func demote[K any](all []Candidate[K], room int64) {
	slices.SortStableFunc(all, func(a, b Candidate[K]) int { return -cmp.Compare(a.Last, b.Last) })
	for i := range all {
		if e := &all[i].Extent; e.Level == Protected {
			if room -= e.Bytes; room < 0 {
				e.Level = Probation
			}
		}
	}
}

// later is how what is open compares with what is not.
func later(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}
