package store_test

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// TestRecording reads in a certain order and looks at what was recorded: chunks of
// 64 KiB of two segments, the second of which begins at 4 MiB of the first's offsets.
func TestRecording(t *testing.T) {
	const second = firstChunk + 4*miB
	for _, tc := range []struct {
		name  string
		reads []index.Range
		max   int
		want  []index.Range
	}{
		{name: "nothing", max: 8},
		{name: "the bootstrap is no chunk", reads: []index.Range{{Off: 0, Len: firstChunk}}, max: 8},
		{name: "whole chunks", reads: []index.Range{{Off: firstChunk + 70*kiB, Len: 1}}, max: 8, want: []index.Range{{Off: firstChunk + 64*kiB, Len: 64 * kiB}}},
		{name: "once", reads: []index.Range{{Off: firstChunk, Len: 1}, {Off: firstChunk + miB, Len: 1}, {Off: firstChunk + 1, Len: 1}}, max: 8,
			want: []index.Range{{Off: firstChunk, Len: 64 * kiB}, {Off: firstChunk + miB, Len: 64 * kiB}}},
		{name: "the order of the reads", reads: []index.Range{{Off: second + miB, Len: 1}, {Off: firstChunk + 128*kiB, Len: 1}, {Off: firstChunk, Len: 1}}, max: 8,
			want: []index.Range{{Off: second + miB, Len: 64 * kiB}, {Off: firstChunk + 128*kiB, Len: 64 * kiB}, {Off: firstChunk, Len: 64 * kiB}}},
		{name: "neighbours", reads: []index.Range{{Off: firstChunk, Len: 65 * kiB}, {Off: firstChunk + 128*kiB, Len: 1}, {Off: firstChunk + 4*64*kiB, Len: 1}}, max: 8,
			want: []index.Range{{Off: firstChunk, Len: 3 * 64 * kiB}, {Off: firstChunk + 4*64*kiB, Len: 64 * kiB}}},
		{name: "much of the same", reads: []index.Range{{Off: firstChunk, Len: 3 * miB / 2}}, max: 8,
			want: []index.Range{{Off: firstChunk, Len: miB}, {Off: firstChunk + miB, Len: miB / 2}}},
		{name: "over the end of a segment", reads: []index.Range{{Off: second - 1, Len: 2}}, max: 8,
			want: []index.Range{{Off: second - 64*kiB, Len: 64 * kiB}, {Off: second, Len: 64 * kiB}}},
		{name: "full", reads: []index.Range{{Off: firstChunk + miB, Len: 1}, {Off: firstChunk, Len: 1}, {Off: second, Len: 1}, {Off: firstChunk + 64*kiB, Len: 1}}, max: 2,
			want: []index.Range{{Off: firstChunk + miB, Len: 64 * kiB}, {Off: firstChunk, Len: 128 * kiB}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			eachMode(t, func(t *testing.T, cfg store.Config) {
				img := storetest.NewImage("recorded", storetest.Solid(1, 4*miB), storetest.Solid(2, 2*miB))
				s := open(t, cfg)
				i := openImage(t, s, img, storetest.NewSource("good", img))
				other := openImage(t, s, img, storetest.NewSource("good", img))
				r := i.Record(tc.max)
				check(t, i.Prefetch(context.Background(), firstChunk+2*miB, miB))
				same(t, other, img.Plain, firstChunk+2*miB, miB)
				for range 2 { // misses, then hits
					for _, read := range tc.reads {
						same(t, i, img.Plain, read.Off, read.Len)
					}
				}
				if at := r.Last(); at.IsZero() != (len(tc.want) == 0) {
					t.Errorf("the last new read was at %v", at)
				}
				got := ranges(t, r)
				same(t, i, img.Plain, firstChunk+3*miB, miB)
				if !slices.Equal(got, tc.want) || !slices.Equal(ranges(t, r), tc.want) {
					t.Errorf("%v, and once more %v, want %v", got, ranges(t, r), tc.want)
				}
			})
		})
	}
}

// ranges stops a recording and returns what was read. The times do not fall.
func ranges(t *testing.T, r *store.Recording) (all []index.Range) {
	t.Helper()
	touches := r.Stop()
	for k, touch := range touches {
		if k > 0 && touch.After < touches[k-1].After {
			t.Errorf("read after %v, the one before it after %v", touch.After, touches[k-1].After)
		}
		all = append(all, touch.Range)
	}
	return all
}

// TestRecordingMapped: what is sent from files is recorded as what is read is.
func TestRecordingMapped(t *testing.T) {
	img := storetest.NewImage("recorded", storetest.Solid(1, 4*miB))
	i := openImage(t, open(t, store.Config{Dir: t.TempDir(), Keep: true}), img, storetest.NewSource("good", img))
	check(t, i.Fill(context.Background()))
	r := i.Record(8)
	if m := i.Map(context.Background(), firstChunk+miB, 100); m.N != 100 {
		t.Fatalf("%d bytes", m.N)
	}
	if got, want := ranges(t, r), (index.Range{Off: firstChunk + miB, Len: 64 * kiB}); len(got) != 1 || got[0] != want {
		t.Errorf("%v, want %v", got, want)
	}
}

// TestRecordingAgain: the second recording of a handle ends the first.
func TestRecordingAgain(t *testing.T) {
	img := storetest.NewImage("recorded", storetest.Solid(1, 4*miB))
	i := openImage(t, open(t, store.Config{Dir: t.TempDir(), Keep: true}), img, storetest.NewSource("good", img))
	first := i.Record(8)
	same(t, i, img.Plain, firstChunk, 1)
	second := i.Record(8)
	same(t, i, img.Plain, firstChunk+miB, 1)
	if a, b := first.Stop(), second.Stop(); len(a) != 1 || a[0].Off != firstChunk || len(b) != 1 || b[0].Off != firstChunk+miB {
		t.Errorf("first %v, second %v", a, b)
	}
}

// TestRecordingConcurrent reads all of an image from many goroutines: every chunk is
// recorded exactly once.
func TestRecordingConcurrent(t *testing.T) {
	eachMode(t, func(t *testing.T, cfg store.Config) {
		img := storetest.NewImage("recorded", storetest.Units(1, 8*miB), storetest.Files(2, 16*kiB, 5, 100*kiB, 17, 64*kiB, 9*kiB))
		i := openImage(t, open(t, cfg), img, storetest.NewSource("good", img))
		r := i.Record(1 << 20)
		var readers sync.WaitGroup
		for k := range int64(8) {
			readers.Go(func() {
				p := make([]byte, 40*kiB)
				for off := k % 4 * 40 * kiB; off < i.Size(); off += 160 * kiB {
					if _, err := i.ReadAt(context.Background(), p[:min(40*kiB, i.Size()-off)], off); err != nil {
						t.Error(err)
					}
				}
			})
		}
		readers.Wait()
		times := map[int64]int{}
		for _, g := range r.Stop() {
			for off := g.Off; off < g.Off+g.Len; off += kiB {
				times[off/kiB]++
			}
		}
		for _, s := range img.Index.Segments {
			for _, c := range s.Table.Chunks {
				if n := times[(s.Off+c.Off)/kiB]; n != 1 {
					t.Fatalf("the chunk at %d of the image is recorded %d times", s.Off+c.Off, n)
				}
			}
		}
	})
}

// BenchmarkRecorded reads present bytes, which are recorded already, with and without a
// recording.
func BenchmarkRecorded(b *testing.B) {
	img := storetest.NewImage("bench", storetest.Solid(1, 64*miB))
	i := openImage(b, open(b, store.Config{Dir: b.TempDir(), Keep: true}), img, storetest.NewSource("good", img))
	check(b, i.Fill(context.Background()))
	for _, recorded := range []bool{false, true} {
		b.Run(fmt.Sprintf("recording=%v", recorded), func(b *testing.B) {
			p := make([]byte, 4*kiB)
			if recorded {
				r := i.Record(1 << 10)
				defer r.Stop()
				all := make([]byte, i.Size())
				if _, err := i.ReadAt(context.Background(), all, 0); err != nil {
					b.Fatal(err)
				}
			}
			for k := int64(0); b.Loop(); k++ {
				if _, err := i.ReadAt(context.Background(), p, firstChunk+k*7919*4096%(64*miB)&^4095); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
