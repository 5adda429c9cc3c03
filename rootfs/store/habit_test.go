package store_test

import (
	"cmp"
	"math/rand/v2"
	"runtime"
	"slices"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// span is something that is read: a file of a layer.
type span struct{ off, n int64 }

// layerFiles cuts n bytes into files of 4 KiB to 256 KiB, most of them small.
func layerFiles(n int64) (files []span) {
	r := rand.New(rand.NewPCG(7, 7))
	for off := int64(0); off < n; {
		size := min(4*kiB<<r.IntN(7), n-off)
		files = append(files, span{off, size})
		off += size
	}
	return files
}

// readFiles reads files one after another, each fetch being over before the next read,
// so that what is fetched does not depend on time.
func readFiles(t *testing.T, s *store.Store, i *store.Image, plain []byte, files []span) (misses int64) {
	t.Helper()
	before := s.Stats().Misses
	for _, f := range files {
		same(t, i, plain, firstChunk+f.off, f.n)
		for s.Stats().FetchesInFlight > 0 {
			runtime.Gosched()
		}
	}
	return s.Stats().Misses - before
}

// What a store without Keep fetches for readers of everything, in the orders that there
// are: bytes as parts of the image, requests, and reads that wait.
func TestReadersOfEverything(t *testing.T) {
	const size = 40 * miB
	img := storetest.NewImage("everything", storetest.Solid(3, size))
	layer := layerFiles(size)
	for _, tc := range []struct {
		name             string
		order            func([]span)
		bytes            float64
		requests, misses int64
	}{
		{"as the layer", func([]span) {}, 1, 22, 5},
		{"directories whose files are sorted otherwise", byDirectory, 1.1, 50, 30},
		{"backwards", slices.Reverse[[]span], 1, 160, 160},
		{"at random", atRandom, 2, 320, 280},
	} {
		t.Run(tc.name, func(t *testing.T) {
			src := storetest.NewSource("good", img)
			s := open(t, store.Config{Dir: t.TempDir()})
			i := openImage(t, s, img, src)
			files := slices.Clone(layer)
			tc.order(files)
			misses := readFiles(t, s, i, img.Plain, files)
			requests, part := int64(len(src.Requests())), float64(src.Bytes())/float64(size)
			t.Logf("%d files: %.2f of the image in %d requests, %d reads waited", len(files), part, requests, misses)
			if part > tc.bytes || requests > tc.requests || misses > tc.misses {
				t.Errorf("more than %.2f in %d requests, or %d", tc.bytes, tc.requests, tc.misses)
			}
			if m := s.Stats().MemoryBytes; m > 16*miB {
				t.Errorf("%d bytes are in memory", m)
			}
		})
	}
}

// byDirectory shuffles each 60 files, as if they were a directory's.
func byDirectory(files []span) {
	r := rand.New(rand.NewPCG(5, 5))
	for part := range slices.Chunk(files, 60) {
		r.Shuffle(len(part), func(a, b int) { part[a], part[b] = part[b], part[a] })
	}
}

func atRandom(files []span) {
	rand.New(rand.NewPCG(9, 9)).Shuffle(len(files), func(a, b int) { files[a], files[b] = files[b], files[a] })
}

// A reader of 4 KiB here and there costs the chunks that it reads, once that is known;
// one who reads on after that gets large windows again.
func TestSparseReader(t *testing.T) {
	img := storetest.NewImage("sparse", storetest.Solid(4, 128*miB))
	src := storetest.NewSource("good", img)
	s := open(t, store.Config{Dir: t.TempDir()})
	i := openImage(t, s, img, src)
	var files []span
	for k := range int64(60) {
		files = append(files, span{(k * 29 % 61) * miB, 4 * kiB})
	}
	readFiles(t, s, i, img.Plain, files)
	large := 0
	for _, r := range src.Requests() {
		if r.N > 64*kiB {
			large++
		}
	}
	if large > 16 {
		t.Errorf("%d of %d requests were for more than was read", large, len(src.Requests()))
	}
	before := len(src.Requests())
	files = files[:0]
	for off := int64(0); off < 62*miB; off += 128 * kiB {
		files = append(files, span{64*miB + off, 128 * kiB})
	}
	readFiles(t, s, i, img.Plain, files)
	after := src.Requests()[before:]
	most := slices.MaxFunc(after, func(a, b storetest.Request) int { return cmp.Compare(a.N, b.N) })
	if len(after) > 40 || most.N != 4*miB {
		t.Errorf("%d requests, the largest for %d bytes", len(after), most.N)
	}
}
