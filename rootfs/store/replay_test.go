package store_test

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// profile is chunks of a first segment of n MiB, every so many of them, in an order that
// jumps to and fro within 1 MiB.
func profile(n, step int64) (all []index.Range) {
	for k := range n * 16 {
		if at := k&^15 | k*7&15; at%step == 0 {
			all = append(all, index.Range{Off: firstChunk + at*64*kiB, Len: 64 * kiB})
		}
	}
	return all
}

func total(ranges []index.Range) (n int64) {
	for _, r := range ranges {
		n += r.Len
	}
	return n
}

// TestReplay: what was replayed is there when its reader comes, was fetched once, in few
// requests, and counts as used.
func TestReplay(t *testing.T) {
	eachMode(t, func(t *testing.T, cfg store.Config) {
		cfg.Memory = 64 * miB
		img := storetest.NewImage("replayed", storetest.Solid(1, 8*miB), storetest.Solid(2, miB))
		src := storetest.NewSource("good", img)
		s := open(t, cfg)
		i := openImage(t, s, img, src)
		want := append(profile(8, 2), index.Range{Off: firstChunk + 8*miB, Len: miB / 2})
		rec := i.Record(1 << 10)
		check(t, rec.Replay(t.Context(), want, 32*miB))
		if n := len(src.Requests()); n > len(want)/2 {
			t.Errorf("%d requests for %d ranges", n, len(want))
		}
		for _, r := range want {
			same(t, i, img.Plain, r.Off, r.Len)
		}
		rec.Stop()
		st := s.Stats()
		if st.Misses != 0 || src.Twice() != 0 {
			t.Errorf("%d misses, %d blocks fetched twice", st.Misses, src.Twice())
		}
		if n := total(want); st.ReplayUsed != n || st.Replayed < n || st.Replayed-st.ReplayUsed != st.ReplayWasted {
			t.Errorf("of %d KiB %d were fetched, %d used, %d wasted", n/kiB, st.Replayed/kiB, st.ReplayUsed/kiB, st.ReplayWasted/kiB)
		}
	})
}

// TestReplayIsBounded: without Keep, what waits for its reader is never more than the
// budget; a reader that takes its time gets everything without waiting.
func TestReplayIsBounded(t *testing.T) {
	const ahead = miB
	img := storetest.NewImage("replayed", storetest.Solid(1, 16*miB))
	src := storetest.NewSource("good", img)
	s := open(t, store.Config{Dir: t.TempDir(), Memory: 4 * miB})
	i := openImage(t, s, img, src)
	want := profile(16, 3) // too far from one another to be fetched together
	rec := i.Record(1 << 10)
	done := make(chan error, 1)
	go func() { done <- rec.Replay(t.Context(), want, ahead) }()
	for _, r := range want {
		eventually(t, func() bool {
			st := s.Stats()
			if st.Replayed-st.ReplayUsed > ahead {
				t.Fatalf("%d KiB ahead of the reader", (st.Replayed-st.ReplayUsed)/kiB)
			}
			return (st.Replayed-st.ReplayUsed+64*kiB > ahead || st.Replayed == total(want)) && st.FetchesInFlight == 0
		})
		same(t, i, img.Plain, r.Off, r.Len)
	}
	check(t, <-done)
	if st := s.Stats(); st.Misses != 0 || st.ReplayUsed != total(want) || src.Twice() != 0 {
		t.Errorf("%d misses, %d KiB used of %d, %d blocks fetched twice", st.Misses, st.ReplayUsed/kiB, total(want)/kiB, src.Twice())
	}
}

// TestReplayLeavesBehind: a reader that needs only what comes last in the profile does
// not wait until somebody reads the rest.
func TestReplayLeavesBehind(t *testing.T) {
	img := storetest.NewImage("replayed", storetest.Solid(1, 16*miB))
	src := storetest.NewSource("good", img)
	s := open(t, store.Config{Dir: t.TempDir(), Memory: 4 * miB})
	i := openImage(t, s, img, src)
	rec := i.Record(1 << 10)
	done := make(chan error, 1)
	whole := []index.Range{{Off: firstChunk, Len: 16 * miB}}
	go func() { done <- rec.Replay(t.Context(), whole, 2*miB) }()
	for off := firstChunk; off < 16*miB; off += 512 * kiB { // a chunk of eight
		eventually(t, func() bool { return s.Stats().Replayed >= min(off-firstChunk+miB, 16*miB) })
		same(t, i, img.Plain, off, 64*kiB)
	}
	check(t, <-done)
	rec.Stop()
	if st := s.Stats(); st.ReplayUsed+st.ReplayWasted != st.Replayed || st.ReplayWasted < 8*miB {
		t.Errorf("%d KiB came, %d were used, %d wasted", st.Replayed/kiB, st.ReplayUsed/kiB, st.ReplayWasted/kiB)
	}
}

// TestReplayEnds: with its context, although nobody reads; when the handle is closed; at
// what no source can give. It lets nothing of a hostile profile through.
func TestReplayEnds(t *testing.T) {
	img := storetest.NewImage("replayed", storetest.Solid(1, 8*miB))
	whole := []index.Range{{Off: firstChunk, Len: 8 * miB}}
	for _, tc := range []struct {
		name     string
		fault    func(storetest.Request) storetest.Fault
		expected []index.Range
		end      func(cancel func(), i *store.Image)
		class    func(error) bool
	}{
		{name: "cancelled", expected: whole, end: func(cancel func(), _ *store.Image) { cancel() }},
		{name: "closed", expected: whole, end: func(cancel func(), i *store.Image) { _ = i.Close(); cancel() }},
		{name: "no source", expected: whole, class: errdefs.IsUnavailable,
			fault: func(storetest.Request) storetest.Fault { return storetest.Fault{Err: errors.New("down")} }},
		{name: "outside", expected: []index.Range{{Off: -1, Len: 8}, {Off: 5, Len: -5}, {Off: math.MaxInt64, Len: math.MaxInt64}, {Off: 1 << 40, Len: 1}, {Off: 0, Len: 8},
			{Off: math.MinInt64, Len: math.MinInt64}, {Off: firstChunk, Len: 0}}},
		{name: "more than there is", expected: []index.Range{{Off: 0, Len: math.MaxInt64}}, end: func(cancel func(), _ *store.Image) { cancel() }},
	} {
		t.Run(tc.name, func(t *testing.T) {
			src := storetest.NewSource("good", img)
			src.Fault = tc.fault
			s := open(t, store.Config{Dir: t.TempDir(), Memory: 4 * miB})
			i := openImage(t, s, img, src)
			rec := i.Record(8)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			done := make(chan error, 1)
			go func() { done <- rec.Replay(ctx, tc.expected, miB) }()
			if tc.end != nil {
				eventually(t, func() bool { return s.Stats().Replayed == miB && s.Stats().FetchesInFlight == 0 })
				tc.end(cancel, i)
			}
			err := <-done
			if tc.class == nil && err != nil || tc.class != nil && !tc.class(err) {
				t.Errorf("%v", err)
			}
			if n := s.Stats().Replayed; n > 2*miB || tc.end == nil && tc.class == nil && n != 0 {
				t.Errorf("%d KiB were fetched", n/kiB)
			}
		})
	}
}

// TestReplayBesideReaders has readers come in orders of their own while a replay is at
// work: they read the right bytes, and all that was replayed is accounted for.
func TestReplayBesideReaders(t *testing.T) {
	eachMode(t, func(t *testing.T, cfg store.Config) {
		cfg.Memory = 4 * miB
		img := storetest.NewImage("replayed", storetest.Solid(1, 8*miB))
		s := open(t, cfg)
		i := openImage(t, s, img, storetest.NewSource("good", img))
		rec := i.Record(1 << 10)
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan error, 1)
		want := profile(8, 3)
		go func() { done <- rec.Replay(ctx, want, miB) }()
		rnd := rand.New(rand.NewPCG(1, 2))
		for k := range want {
			near := min(len(want)-1, k+rnd.IntN(8))
			same(t, i, img.Plain, want[near].Off, want[near].Len)
			same(t, i, img.Plain, firstChunk+rnd.Int64N(8*miB-4*kiB), 4*kiB)
		}
		cancel()
		check(t, <-done)
		rec.Stop()
		if st := s.Stats(); st.ReplayUsed+st.ReplayWasted != st.Replayed {
			t.Errorf("%d bytes came, %d were used, %d wasted", st.Replayed, st.ReplayUsed, st.ReplayWasted)
		}
	})
}
