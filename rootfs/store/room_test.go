package store

import (
	"context"
	"log/slog"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// A reader may have loaded the links of a segment before another target is added, and
// find a link to that.
func TestLinksOfReader(t *testing.T) {
	table := &index.Table{Size: index.UnitSize, Chunks: []index.Chunk{{Len: index.UnitSize}}}
	s := &Store{segments: map[index.ID]*segment{}}
	g := newSegment(s, "reader", table)
	var last *segment
	for _, id := range []index.ID{digest.FromString("first"), digest.FromString("second")} {
		last = newSegment(s, id, table)
		s.segments[id] = last
	}
	s.dir = layout(t.TempDir())
	if err := s.dir.make(); err != nil {
		t.Fatal(err)
	}
	if _, err := g.target(digest.FromString("first")); err != nil {
		t.Fatal(err)
	}
	l := g.links.Load()
	n, err := g.target(digest.FromString("second"))
	if err != nil {
		t.Fatal(err)
	}
	g.setLink(0, n, 0)
	if got, j := l.get(0); got != last || j != 0 {
		t.Errorf("chunk %d of %v, want the second target", j, got)
	}
}

// fullWhen is an error of a full disk that does something when it is looked at for the
// second time.
type fullWhen struct {
	looks int
	do    func()
}

func (f *fullWhen) Error() string { return "full" }

func (f *fullWhen) Is(target error) bool {
	if f.looks++; f.looks == 2 {
		f.do()
	}
	return target == unix.ENOSPC
}

// Whoever begins to wait for room when nothing has just been found, and nobody looks
// again, does not wait.
func TestAwaitRoomWhenStuck(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	s := &Store{cfg: Config{Keep: true}, ctx: ctx, room: newRoom(false), usage: newUsage(1, 0)}
	if s.awaitRoom(ctx, &fullWhen{do: func() { s.room.stuck.Store(true) }}) || ctx.Err() != nil {
		t.Errorf("it is worth trying again, or the wait had no end (%v)", ctx.Err())
	}
}

// An eviction that finds nothing does not say so when more may go since it looked, and
// one that finds enough ends that nothing may go.
func TestStuckNoLonger(t *testing.T) {
	s := &Store{ctx: t.Context(), room: newRoom(false), usage: newUsage(1, 0), log: slog.New(slog.DiscardHandler)}
	looked := s.room.retries.Load()
	s.retry() // an image was closed
	if s.noRoom(looked, false); s.room.stuck.Load() || len(s.room.wake) == 0 {
		t.Errorf("stuck: %v, to look again: %d", s.room.stuck.Load(), len(s.room.wake))
	}
	if s.noRoom(s.room.retries.Load(), false); !s.room.stuck.Load() {
		t.Error("not stuck when nothing may go")
	}
	if s.evict(0, false); s.room.stuck.Load() {
		t.Error("stuck after enough went")
	}
}

// What makes way is gone in every respect before its bytes go: for readers, who find
// another epoch, for syncs that fail later and for fetches that write meanwhile.
func TestLeave(t *testing.T) {
	table := &index.Table{Size: 3 * index.UnitSize}
	for off := int64(0); off < table.Size; off += index.UnitSize {
		table.Chunks = append(table.Chunks, index.Chunk{Off: off, Len: index.UnitSize})
	}
	g := newSegment(&Store{known: newKnown(0)}, "id", table)
	g.home.Store(&home{own: true})
	chunks := newBitmap(3)
	for i := range 3 {
		g.mark(i)
		g.durable.set(i)
		if i > 0 {
			chunks.set(i)
		}
	}
	epoch, lost := g.epoch.Load(), g.lost.Load()
	gone := g.leave(chunks, []int{2, 7})
	for i, want := range []bool{true, false, true} {
		if g.owns(i) != want || g.durable.has(i) != want || gone.has(i) == want {
			t.Errorf("chunk %d: there %v, durable %v, gone %v", i, g.owns(i), g.durable.has(i), gone.has(i))
		}
	}
	if g.missing.Load() != index.UnitSize || g.epoch.Load() == epoch || g.lost.Load() == lost {
		t.Errorf("%d bytes are missing, epoch %d, lost %d", g.missing.Load(), g.epoch.Load(), g.lost.Load())
	}
}
