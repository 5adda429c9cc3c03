package store

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/rootfs/store/replace"
)

// room says when bytes have to make way, and counts those that have.
type room struct {
	wake    chan struct{} // has one element when makeRoom is to look
	held    atomic.Bool   // until Release
	pressed atomic.Bool   // the disk is full whatever the quota says
	stuck   atomic.Bool   // nothing may be given up until an image is closed or removed, or Release
	spent   atomic.Bool   // the same of what only the class that yields has used
	wanted  atomic.Bool   // another class than that needs room, or who did is not known
	told    atomic.Bool   // that was logged
	retries atomic.Int64  // how often more might go than before
	evicted atomic.Int64  // bytes
	refused atomic.Int64  // bytes that were not kept for want of quota

	mu    sync.Mutex
	round chan struct{} // closed when makeRoom has looked once more; protected by mu
}

func newRoom(held bool) *room {
	r := &room{wake: make(chan struct{}, 1), round: make(chan struct{})}
	r.held.Store(held)
	r.stuck.Store(held)
	r.wanted.Store(true)
	return r
}

// next ends when makeRoom has looked once more.
func (r *room) next() <-chan struct{} {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.round
}

func (r *room) looked() {
	r.mu.Lock()
	defer r.mu.Unlock()
	close(r.round)
	r.round = make(chan struct{})
}

// admit says whether n more bytes may be kept, which are spare or not. It takes no lock:
// readers at the same time may exceed the quota by a chunk each.
func (s *Store) admit(n int64, spare bool) error {
	if !s.exceeded(n, spare) {
		return nil
	}
	s.room.refused.Add(n)
	s.checkRoom(spare)
	return fmt.Errorf("quota of %d bytes is used up by images that are open, pinned or of more important classes: %w", s.cfg.Quota, errdefs.ErrResourceExhausted)
}

// exceeded says whether n more bytes are over the quota. When there are no spare ones
// to make way, more of them are already when they are above the high watermark.
func (s *Store) exceeded(n int64, spare bool) bool {
	limit := s.cfg.Quota
	if spare && s.room.spent.Load() {
		limit = s.cfg.High
	}
	return s.cfg.Quota > 0 && s.usage.used.Load()+n > limit
}

// checkRoom has bytes given up when the store is above its high watermark, only spare
// ones when those that came are.
func (s *Store) checkRoom(spare bool) {
	if s.excess() > 0 {
		s.need(spare)
	}
}

// need has bytes given up, if any may go that may make way for what came.
func (s *Store) need(spare bool) {
	if !spare {
		s.room.wanted.Store(true)
	}
	if !s.room.none(spare) {
		s.wakeRoom()
	}
}

// none says that nothing may go that may make way for spare bytes, or for others.
func (r *room) none(spare bool) bool { return r.stuck.Load() || spare && r.spent.Load() }

func (s *Store) wakeRoom() {
	select {
	case s.room.wake <- struct{}{}:
	default:
	}
}

// retry is for when more may be given up than before.
func (s *Store) retry() {
	if s.room.held.Load() {
		return
	}
	s.room.retries.Add(1)
	s.room.stuck.Store(false)
	s.room.spent.Store(false)
	s.wakeRoom()
}

func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// awaitRoom has bytes given up when err says that the disk is full, and waits for
// that, as the work of ctx. It reports whether it is worth trying again. Precondition:
// no lock is held.
func (s *Store) awaitRoom(ctx context.Context, err error) bool {
	spare := s.spare(sched.From(ctx).Standing().Flow)
	if !s.cfg.Keep || !isFull(err) || s.room.none(spare) {
		return false
	}
	round := s.room.next()
	s.full(err, spare)
	if s.room.none(spare) { // after next: whoever gets stuck later than this ends the round
		return false
	}
	select {
	case <-round:
	case <-ctx.Done():
	case <-s.ctx.Done():
	}
	return !s.room.none(spare) && s.ctx.Err() == nil && ctx.Err() == nil
}

// full has bytes given up when err says that the disk is full, only spare ones when
// those that it did not take are.
func (s *Store) full(err error, spare bool) {
	if isFull(err) {
		s.room.pressed.Store(true)
		s.need(spare)
	}
}

// pressedShare is what is given up at least when the disk is full: one part in so
// many of what the store has.
const pressedShare = 20

// excess is how many bytes should be given up now.
func (s *Store) excess() int64 {
	used, n := s.usage.used.Load(), int64(0)
	if s.cfg.Quota > 0 && used > s.cfg.High {
		n = used - s.cfg.Low
	}
	if s.room.pressed.Load() {
		n = max(n, used/pressedShare, 1)
	}
	return n
}

// makeRoom gives bytes up whenever it is woken and there is need.
func (s *Store) makeRoom() {
	select {
	case <-s.surveyed:
	case <-s.ctx.Done():
	}
	for s.ctx.Err() == nil {
		if !s.room.held.Load() {
			spare := !s.room.wanted.Swap(false) // before it is seen how full the store is
			if need := s.excess(); need > 0 {
				s.evict(need, spare)
			}
		}
		s.room.looked()
		select {
		case <-s.room.wake:
		case <-s.ctx.Done():
		}
	}
}

// victim names an extent of a segment or, with an image, its complete file.
type victim struct {
	id    index.ID
	n     int
	whole digest.Digest
}

// evictStep is how many extents of one segment go at a time: readers of the
// segment that come meanwhile, and have to fetch, wait for that.
const evictStep = 16

// evict gives need bytes up, or all that may go: only spare ones, as long as no other
// class than the one that yields needs room.
func (s *Store) evict(need int64, spare bool) {
	tried := map[victim]bool{}
	for need > 0 && s.ctx.Err() == nil {
		retries := s.room.retries.Load()
		spare = !s.room.wanted.Swap(false) && spare
		steps := group(s.pick(need, spare, tried))
		if len(steps) == 0 {
			s.noRoom(retries, spare)
			return
		}
		for _, step := range steps {
			if s.makeWay(); s.ctx.Err() != nil {
				return
			}
			for _, v := range step {
				tried[v] = true
			}
			need -= s.evictStep(step)
		}
	}
	s.room.pressed.Store(false)
	s.room.stuck.Store(false)
	s.room.spent.Store(false)
	s.room.told.Store(false)
}

// noRoom ends an eviction, maybe of spare bytes only, that has found too little after
// so many retries. When there was another one since it looked, more may go by now, and
// so it may when others need room.
func (s *Store) noRoom(retries int64, spare bool) {
	s.room.spent.Store(true)
	if !spare {
		s.room.stuck.Store(true)
		s.room.wanted.Store(true)
	}
	if s.room.retries.Load() != retries {
		s.room.spent.Store(false)
		s.room.stuck.Store(false)
		s.wakeRoom()
		return
	}
	if spare && s.room.wanted.Load() {
		s.wakeRoom()
		return
	}
	s.room.pressed.Store(false)
	if !spare && !s.room.told.Swap(true) {
		s.log.Warn("the store is full of what is open or pinned; what is fetched now is not kept",
			"dir", s.cfg.Dir, "used", s.usage.used.Load(), "quota", s.cfg.Quota)
	}
}

// How eviction shares the disk: for how long no demand read has to have waited before
// a step, and after which time the step is done all the same.
const (
	evictQuiet    = 20 * time.Millisecond
	evictPatience = 200 * time.Millisecond
)

// makeWay lets demand reads go first while there is room for what they bring.
func (s *Store) makeWay() {
	if s.room.pressed.Load() || s.usage.used.Load() >= (s.cfg.High+s.cfg.Quota)/2 {
		return
	}
	_ = s.demand.pass(s.ctx, evictQuiet, evictPatience) // the caller looks at ctx
}

// group puts together what goes of one segment, evictStep extents at most.
func group(victims []replace.Candidate[victim]) [][]victim {
	var out [][]victim
	at := map[index.ID]int{} // of a segment's last step in out, plus one
	for _, v := range victims {
		k := at[v.Key.id]
		if v.Key.whole != "" || k == 0 || len(out[k-1]) == evictStep {
			out = append(out, nil)
			k = len(out)
			at[v.Key.id] = k
		}
		out[k-1] = append(out[k-1], v.Key)
	}
	return out
}

// pick chooses what goes, maybe of spare extents only, leaving out what was tried.
func (s *Store) pick(need int64, spare bool, tried map[victim]bool) []replace.Candidate[victim] {
	s.accountOpen()
	s.mu.Lock()
	all, elsewhere := s.candidates(tried)
	s.mu.Unlock()
	if spare {
		all = slices.DeleteFunc(all, func(c replace.Candidate[victim]) bool { return c.Level > replace.Spare })
	}
	return replace.Pick(all, max(s.cfg.Quota, s.usage.used.Load()), elsewhere, need)
}

// accountOpen finds out what the segments that are read have which may make way even so.
func (s *Store) accountOpen() {
	var busy map[index.ID]bool
	s.each(func(g *segment) bool {
		if busy == nil {
			busy = s.busy()
		}
		return g.users > 0 && g.dirty.Load() && !busy[g.id]
	}, func(g *segment) {
		g.flushMu.Lock()
		defer g.flushMu.Unlock()
		g.account()
	})
}

// candidates lists what may go, and how many bytes of protected extents may not.
// Precondition: mu is held.
func (s *Store) candidates(tried map[victim]bool) (all []replace.Candidate[victim], elsewhere int64) {
	busy := s.busy()
	u := s.usage
	u.mu.Lock()
	defer u.mu.Unlock()
	for id, g := range u.segments {
		for n, e := range g.extents {
			v := victim{id: id, n: n}
			open := s.isRead(id)
			switch {
			case e.Bytes == 0 || tried[v]:
			case !busy[id] && (!open || e.Level == replace.Spare):
				all = append(all, replace.Candidate[victim]{Extent: e, Key: v, Open: open})
			case e.Level == replace.Protected:
				elsewhere += e.Bytes
			}
		}
	}
	for m, n := range u.wholes {
		if v := (victim{whole: m}); !tried[v] && s.wholeMayGo(m, busy) {
			all = append(all, replace.Candidate[victim]{Extent: s.useOfWhole(m, n), Key: v})
		}
	}
	return all, elsewhere
}

// isRead says whether anybody has a segment open to read it. Precondition: mu is held.
func (s *Store) isRead(id index.ID) bool {
	g := s.segments[id]
	return g != nil && g.users > 0
}

// busy returns the segments of which nothing is given up: those that are read, but for
// those that only the class that yields reads, or pinned, or were ingested for an image
// to come. Precondition: mu is held.
func (s *Store) busy() map[index.ID]bool {
	out := map[index.ID]bool{}
	for h := range s.handles {
		if h.spare() {
			continue
		}
		for k := range h.views {
			out[h.views[k].seg.id] = true
		}
	}
	for id := range s.ingested {
		out[id] = true
	}
	for m := range s.pinned {
		for _, g := range s.records[m].Segments {
			out[g.ID] = true
		}
	}
	return out
}

// inUse returns the busy segments and all that are read: what their links lead to
// stays. Precondition: mu is held.
func (s *Store) inUse() map[index.ID]bool {
	out := s.busy()
	for id := range s.segments {
		if s.isRead(id) {
			out[id] = true
		}
	}
	return out
}

// wholeMayGo says whether the complete file of an image may go: no segment that may
// live there is open or busy. Precondition: mu is held.
func (s *Store) wholeMayGo(manifest digest.Digest, busy map[index.ID]bool) bool {
	if s.images[manifest] != nil || s.pinned[manifest] {
		return false
	}
	for _, g := range s.records[manifest].Segments {
		if busy[g.ID] || s.segments[g.ID] != nil {
			return false
		}
	}
	return true
}

// useOfWhole is how the complete file of an image was used: as the extent of its
// segments that was used most. Precondition: mu and usage.mu are held.
func (s *Store) useOfWhole(manifest digest.Digest, bytes int64) replace.Extent {
	out := replace.Extent{Bytes: bytes}
	for _, r := range s.records[manifest].Segments {
		if g := s.usage.segments[r.ID]; g != nil {
			for _, e := range g.extents {
				out.Level, out.Last = max(out.Level, e.Level), max(out.Last, e.Last)
			}
		}
	}
	return out
}

// evictStep gives up extents of one segment, or a complete file, and returns how
// many bytes of disk that brought.
func (s *Store) evictStep(step []victim) int64 {
	var n int64
	var err error
	if m := step[0].whole; m != "" {
		n, err = s.evictWhole(m)
	} else {
		n, err = s.evictExtents(step)
	}
	if err != nil {
		s.log.Warn("bytes cannot be given up", "segment", step[0].id, "image", step[0].whole, "err", err)
	}
	s.room.evicted.Add(n)
	return n
}

// Release ends what Config.Hold began. It is idempotent.
func (s *Store) Release() {
	s.room.held.Store(false)
	s.retry()
}

// SetPinned says which images' bytes are not given up, in the place of those before.
// They need not be in the store.
func (s *Store) SetPinned(manifests ...digest.Digest) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.pinned = map[digest.Digest]bool{}
	for _, m := range manifests {
		s.pinned[m] = true
	}
	s.retry()
}

// Space is what a store takes of the disk, in bytes. Tables, records and bootstraps
// do not count.
type Space struct {
	Used             int64 // by segments and complete files
	Quota, High, Low int64 // of Config, with defaults; 0: no bound
	Pinned           int64 // of Used, by segments of pinned images
	Evicted          int64 // given up since Open
	Refused          int64 // not kept since Open, because there was no quota left
}

// Space returns what the store takes of the disk. Soon after Open it is not all
// known yet.
func (s *Store) Space() Space {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := Space{
		Used: s.usage.used.Load(), Quota: s.cfg.Quota, High: s.cfg.High, Low: s.cfg.Low,
		Evicted: s.room.evicted.Load(), Refused: s.room.refused.Load(),
	}
	s.usage.mu.Lock()
	defer s.usage.mu.Unlock()
	seen := map[index.ID]bool{}
	for m := range s.pinned {
		out.Pinned += s.usage.wholes[m]
		for _, r := range s.records[m].Segments {
			if g := s.usage.segments[r.ID]; g != nil && !seen[r.ID] {
				out.Pinned += g.disk.Load()
				seen[r.ID] = true
			}
		}
	}
	return out
}
