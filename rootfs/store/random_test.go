package store_test

import (
	"context"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// world is a store, images that share chunks, and what the store must have.
type world struct {
	t      *testing.T
	rnd    *rand.Rand
	cfg    store.Config
	s      *store.Store
	images []*storetest.Image
	src    *storetest.Source
	open   map[int]*store.Image
	exists map[int]bool // in the store
	whole  map[int]bool // was complete: must stay so until it is removed
}

// newWorld makes images whose segments are random runs of one pool of chunks, so
// that most chunks are in several of them, at any distance and block boundary.
func newWorld(t *testing.T, seed uint64) *world {
	w := &world{
		t: t, rnd: rand.New(rand.NewPCG(seed, 1)), cfg: store.Config{Dir: t.TempDir(), Keep: true, Window: 256 * kiB},
		open: map[int]*store.Image{}, exists: map[int]bool{}, whole: map[int]bool{},
	}
	pool := storetest.Solid(seed, 2*miB).Plain
	own := storetest.Solid(seed+1, 2*miB).Plain
	for k := range 5 {
		var segments []storetest.Segment
		for range 1 + w.rnd.IntN(2) {
			var parts [][]byte
			for range 1 + w.rnd.IntN(5) {
				from := w.rnd.Int64N(6) * 256 * kiB
				parts = append(parts, pool[from:from+(1+w.rnd.Int64N(2))*256*kiB])
			}
			at := w.rnd.Int64N(400) * 4 * kiB
			segments = append(segments, storetest.Cut(6000, append(parts, own[at:at+100*kiB])...))
		}
		w.images = append(w.images, storetest.NewImage(string(make([]byte, k+1)), segments...))
	}
	w.src = storetest.NewSource("good", w.images...)
	w.reopen()
	return w
}

// reopen closes the store and opens it again.
func (w *world) reopen() {
	if w.s != nil {
		check(w.t, w.s.Close())
	}
	clear(w.open)
	var err error
	w.s, err = store.Open(w.cfg)
	check(w.t, err)
	if w.rnd.IntN(2) == 0 {
		w.s.Scanned()
	}
}

// image opens image k if it is not open. One that must be complete has no source.
func (w *world) image(k int) *store.Image {
	if w.open[k] == nil {
		sources := []store.Source{w.src}
		if w.whole[k] {
			sources = nil
		}
		i, err := w.s.OpenImage(context.Background(), w.images[k].Index, sources)
		check(w.t, err)
		w.open[k], w.exists[k] = i, true
	}
	return w.open[k]
}

func (w *world) step() {
	k := w.rnd.IntN(len(w.images))
	switch w.rnd.IntN(16) {
	case 0:
		check(w.t, w.image(k).Fill(context.Background()))
		w.whole[k] = true
	case 1:
		w.remove(k)
	case 2:
		w.reopen()
	case 3:
		w.close(k)
	case 4:
		_, err := w.s.GC()
		check(w.t, err)
	case 5:
		w.s.Flush()
	case 6:
		w.materialize(k)
	case 7:
		w.ingest(k)
	case 8:
		check(w.t, w.image(k).Prefetch(context.Background(), w.rnd.Int64N(miB), miB/4))
	default:
		img := w.images[k]
		off := w.rnd.Int64N(int64(len(img.Plain)))
		same(w.t, w.image(k), img.Plain, off, 1+w.rnd.Int64N(300*kiB))
	}
}

func (w *world) close(k int) {
	if w.open[k] != nil {
		check(w.t, w.open[k].Close())
		delete(w.open, k)
	}
}

func (w *world) remove(k int) {
	w.close(k)
	if w.exists[k] {
		check(w.t, w.s.Remove(w.images[k].Index.Manifest))
	}
	delete(w.exists, k)
	delete(w.whole, k)
}

func (w *world) materialize(k int) {
	name, err := w.image(k).Materialize(context.Background())
	check(w.t, err)
	w.whole[k] = true
	got, err := os.ReadFile(name)
	check(w.t, err)
	if string(got) != string(w.images[k].Plain) {
		w.t.Error("the complete file differs")
	}
}

func (w *world) ingest(k int) {
	img := w.images[k]
	g := img.Index.Segments[w.rnd.IntN(len(img.Index.Segments))]
	ingest(w.t, w.s, storetest.Segment{Table: g.Table, Plain: img.Plain[g.Off:g.End()]})
}

// verify reads everything. What must be complete is.
func (w *world) verify() {
	for k, img := range w.images {
		i := w.image(k)
		if w.whole[k] && !i.Complete() {
			w.t.Errorf("image %d lost %d bytes", k, i.Size()-i.Present())
		}
		sameAll(w.t, i, img.Plain, 200_000)
	}
}

// Random operations over images that share most of their chunks: every byte is
// right, what was complete stays complete though others come and go, and nothing
// is left in the end.
func TestRandom(t *testing.T) {
	for seed := range uint64(8) {
		w := newWorld(t, seed)
		for n := range 150 {
			w.step()
			if n%50 == 49 {
				w.verify()
			}
			if t.Failed() {
				t.Fatalf("seed %d, step %d", seed, n)
			}
		}
		w.reopen()
		w.verify()
		for k := range w.images {
			w.remove(k)
		}
		_, err := w.s.GC()
		check(t, err)
		check(t, w.s.Close())
		if left := files(t, w.cfg.Dir); len(left) > 0 {
			t.Fatalf("seed %d: files left: %v", seed, left)
		}
	}
}
