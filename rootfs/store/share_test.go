package store_test

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// versions makes two images of one segment each: 8 MiB, of which the second has
// 2 MiB to itself, in the middle, and the rest in another order.
func versions() (a, b *storetest.Image) {
	old, fresh := storetest.Solid(1, 8*miB), storetest.Solid(2, 2*miB)
	next := storetest.Cut(64*kiB, old.Plain[4*miB:7*miB], fresh.Plain, old.Plain[miB:4*miB])
	return storetest.NewImage("first", old), storetest.NewImage("second!", next)
}

const sharedBytes = 6 * miB // of versions

func dataFile(cfg store.Config, img *storetest.Image) string {
	return filepath.Join(cfg.Dir, "segments", img.Index.Segments[0].ID.Encoded()+".data")
}

// onDisk is how many bytes of disk a file takes.
func onDisk(t *testing.T, name string) int64 {
	t.Helper()
	var st unix.Stat_t
	check(t, unix.Stat(name, &st))
	return st.Blocks * 512
}

// wantDisk wants a file to take n bytes of disk and little more.
func wantDisk(t *testing.T, name string, n int64) {
	t.Helper()
	if got := onDisk(t, name); got < n || got > n+128*kiB {
		t.Errorf("%s takes %d KiB of disk, want %d", filepath.Base(name), got/kiB, n/kiB)
	}
}

func fill(t *testing.T, i *store.Image) {
	t.Helper()
	check(t, i.Fill(context.Background()))
	if !i.Complete() {
		t.Error("not complete")
	}
}

// What the first version has, the second neither fetches nor keeps, also after a
// restart, and reads right.
func TestShared(t *testing.T) {
	a, b := versions()
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s := open(t, cfg)
	fill(t, openImage(t, s, a, storetest.NewSource("a", a)))
	src := storetest.NewSource("b", b)
	i := openImage(t, s, b, src)
	sameAll(t, i, b.Plain, 100_000)
	fill(t, i)
	sameAll(t, i, b.Plain, 100_000)
	if n := src.Bytes(); n != 8*miB-sharedBytes {
		t.Errorf("%d KiB fetched", n/kiB)
	}
	if st := s.Stats(); st.SharedBytes != sharedBytes || st.SharedChunks != sharedBytes/(64*kiB) {
		t.Errorf("%d chunks of %d bytes shared", st.SharedChunks, st.SharedBytes)
	}
	s.Flush()
	wantDisk(t, dataFile(cfg, b), 8*miB-sharedBytes)
	check(t, s.Close())

	s = open(t, cfg)
	i, err := s.LoadImage(context.Background(), b.Index.Manifest, nil)
	check(t, err)
	if !i.Complete() {
		t.Errorf("%d of %d bytes present", i.Present(), i.Size())
	}
	sameAll(t, i, b.Plain, 100_000)
	check(t, i.Close())
}

// The store finds chunks again that were there before it was opened.
func TestSharedAfterRestart(t *testing.T) {
	a, b := versions()
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s := open(t, cfg)
	fill(t, openImage(t, s, a, storetest.NewSource("a", a)))
	check(t, s.Close())
	s = open(t, cfg)
	s.Scanned()
	src := storetest.NewSource("b", b)
	fill(t, openImage(t, s, b, src))
	if n := src.Bytes(); n != 8*miB-sharedBytes {
		t.Errorf("%d KiB fetched", n/kiB)
	}
}

// Shared chunks are read when no source works, though their neighbours are not.
func TestSharedWithoutSource(t *testing.T) {
	a, b := versions()
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true})
	fill(t, openImage(t, s, a, storetest.NewSource("a", a)))
	i := openImage(t, s, b)
	same(t, i, b.Plain, firstChunk+5*miB, 64*kiB) // its window begins before it
	same(t, i, b.Plain, firstChunk, 3*miB)
	same(t, i, b.Plain, firstChunk+5*miB, 3*miB)
	if _, err := i.ReadAt(context.Background(), make([]byte, 4*kiB), firstChunk+4*miB); !errdefs.IsUnavailable(err) {
		t.Errorf("read: %v", err)
	}
}

// Chunks that a segment has twice are fetched and kept once.
func TestSharedWithin(t *testing.T) {
	part := storetest.Solid(1, 2*miB).Plain
	img := storetest.NewImage("within", storetest.Cut(64*kiB, part, part, part))
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s := open(t, cfg)
	src := storetest.NewSource("good", img)
	i := openImage(t, s, img, src)
	check(t, i.Prefetch(context.Background(), firstChunk, 2*miB))
	fill(t, i)
	sameAll(t, i, img.Plain, 100_000)
	if n := src.Bytes(); n != 2*miB {
		t.Errorf("%d KiB fetched", n/kiB)
	}
	s.Flush()
	wantDisk(t, dataFile(cfg, img), 2*miB)
	check(t, i.Close())
	i = openImage(t, s, img)
	sameAll(t, i, img.Plain, 100_000)
}

// Chunks that are too small, or whose sums nobody can verify, or of another
// algorithm, or beyond the bound are not shared; nor is anything without Keep.
func TestNotShared(t *testing.T) {
	old := storetest.Solid(1, miB)
	same := func(n int64, a index.Algorithm) (storetest.Segment, storetest.Segment) {
		return storetest.Cut(n, old.Plain).Summed(a), storetest.Cut(n, old.Plain, old.Plain[:64*kiB]).Summed(a)
	}
	cases := []struct {
		name   string
		cfg    store.Config
		chunk  int64
		a      index.Algorithm
		shares bool
	}{
		{"shared", store.Config{Keep: true}, 64 * kiB, index.BLAKE3, true},
		{"one block", store.Config{Keep: true}, 4 * kiB, index.SHA256, true},
		{"small", store.Config{Keep: true}, 2 * kiB, index.SHA256, false},
		{"vouched", store.Config{Keep: true}, 64 * kiB, index.Vouched, false},
		{"off", store.Config{Keep: true, Dedup: -1}, 64 * kiB, index.SHA256, false},
		{"keep none", store.Config{}, 64 * kiB, index.SHA256, false},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			one, two := same(c.chunk, c.a)
			a, b := storetest.NewImage("a", one), storetest.NewImage("image b", two)
			src := storetest.Vouching{Source: storetest.NewSource("good", a, b), Knows: func(index.ID) bool { return true }}
			c.cfg.Dir = t.TempDir()
			s := open(t, c.cfg)
			sameAll(t, openImage(t, s, a, src), a.Plain, 128*kiB)
			sameAll(t, openImage(t, s, b, src), b.Plain, 128*kiB)
			if n := s.Stats().SharedChunks; (n > 0) != c.shares {
				t.Errorf("%d chunks shared", n)
			}
		})
	}
}

func TestDedupBound(t *testing.T) {
	img := storetest.NewImage("bound", storetest.Solid(1, 4*miB))
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true, Dedup: 10})
	fill(t, openImage(t, s, img, storetest.NewSource("good", img)))
	if n := s.Known(); n != 10 {
		t.Errorf("%d chunks known", n)
	}
}

// Either image can go, whether open or not meanwhile, and the other stays
// complete; its bytes are kept once, and all go with the last.
func TestSharedRemove(t *testing.T) {
	cases := []struct {
		name      string
		first     bool // the one whose bytes are shared goes first
		open      bool // the other is open meanwhile
		materials bool // the one that goes has a complete file
	}{
		{"first", true, false, false}, {"first, other open", true, true, false},
		{"first materialized", true, false, true}, {"first materialized, other open", true, true, true},
		{"second", false, false, false}, {"second, other open", false, true, false}, {"second materialized", false, true, true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			goes, stays := versions()
			cfg := store.Config{Dir: t.TempDir(), Keep: true}
			s := open(t, cfg)
			ia := openImage(t, s, goes, storetest.NewSource("a", goes))
			fill(t, ia)
			ib := openImage(t, s, stays, storetest.NewSource("b", stays))
			fill(t, ib)
			if !c.first {
				goes, stays, ia, ib = stays, goes, ib, ia
			}
			if c.materials {
				_, err := ia.Materialize(context.Background())
				check(t, err)
			}
			check(t, ia.Close())
			if !c.open {
				check(t, ib.Close())
			}
			check(t, s.Remove(goes.Index.Manifest))
			if c.open {
				staysWhole(t, ib, stays)
				check(t, ib.Close())
			}
			check(t, s.Close())
			s = open(t, cfg)
			ib, err := s.LoadImage(context.Background(), stays.Index.Manifest, nil)
			check(t, err)
			staysWhole(t, ib, stays)
			check(t, ib.Close())
			if _, err := os.Stat(dataFile(cfg, goes)); (err == nil) != c.first {
				t.Errorf("data of the image that went: %v", err)
			}
			if c.first {
				wantDisk(t, dataFile(cfg, goes), sharedBytes)
			}
			freed, err := s.GC()
			if freed != 0 || err != nil {
				t.Errorf("gc freed %d, %v", freed, err)
			}
			check(t, s.Remove(stays.Index.Manifest))
			if left := files(t, cfg.Dir); len(left) > 0 {
				t.Errorf("files left: %v", left)
			}
			if n := s.Known(); n > 0 {
				t.Errorf("%d chunks are known still", n)
			}
		})
	}
}

func staysWhole(t *testing.T, i *store.Image, img *storetest.Image) {
	t.Helper()
	if !i.Complete() {
		t.Errorf("%d of %d bytes present", i.Present(), i.Size())
	}
	sameAll(t, i, img.Plain, 100_000)
}

// An image comes back after it was cut down to what another needs.
func TestSharedRemoveAndReturn(t *testing.T) {
	a, b := versions()
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true})
	src := storetest.NewSource("good", a, b)
	ia, ib := openImage(t, s, a, src), openImage(t, s, b, src)
	fill(t, ia)
	fill(t, ib)
	check(t, ia.Close())
	check(t, s.Remove(a.Index.Manifest))
	before := src.Bytes()
	ia = openImage(t, s, a, src)
	fill(t, ia)
	sameAll(t, ia, a.Plain, 100_000)
	if n := src.Bytes() - before; n != 8*miB-sharedBytes {
		t.Errorf("%d KiB fetched again", n/kiB)
	}
	sameAll(t, ib, b.Plain, 100_000)
}

// An ingested segment does not keep a second copy of what the store has.
func TestSharedIngest(t *testing.T) {
	a, b := versions()
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s := open(t, cfg)
	fill(t, openImage(t, s, a, storetest.NewSource("a", a)))
	g := b.Index.Segments[0]
	id := ingest(t, s, storetest.Segment{Table: g.Table, Plain: b.Plain[g.Off:g.End()]})
	i := openImage(t, s, b)
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 20 {
			sameAll(t, i, b.Plain, 100_000)
		}
	})
	eventually(t, func() bool { return s.Stats().SharedBytes == sharedBytes })
	wg.Wait()
	eventually(t, func() bool { return onDisk(t, dataFile(cfg, b)) <= 8*miB-sharedBytes+128*kiB })
	check(t, s.Close())
	if n := suffixed(t, cfg.Dir, ".links"); n != 1 || id != g.ID {
		t.Errorf("%d files of links", n)
	}
	s = open(t, cfg)
	i, err := s.LoadImage(context.Background(), b.Index.Manifest, nil)
	check(t, err)
	staysWhole(t, i, b)
	check(t, i.Close())
}

// rot changes a byte of every chunk of 64 KiB in [off, end) of a file.
func rot(t *testing.T, name string, off, end int64) {
	t.Helper()
	f, err := os.OpenFile(name, os.O_RDWR, 0)
	check(t, err)
	for ; off < end; off += 64 * kiB {
		_, err := f.WriteAt([]byte("rotten"), off+5000)
		check(t, err)
	}
	check(t, f.Close())
}

// Bytes that have rotted on the disk do not spread: they are fetched, for both.
func TestSharedRot(t *testing.T) {
	a, b := versions()
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s := open(t, cfg)
	srcA, srcB := storetest.NewSource("a", a), storetest.NewSource("b", b)
	ia := openImage(t, s, a, srcA)
	fill(t, ia)
	rot(t, dataFile(cfg, a), 2*miB, 2*miB+128*kiB)
	rot(t, dataFile(cfg, a), 5*miB, 5*miB+64*kiB)
	ib := openImage(t, s, b, srcB)
	sameAll(t, ib, b.Plain, 100_000)
	fill(t, ib)
	if n := srcB.Bytes(); n != 8*miB-sharedBytes+3*64*kiB {
		t.Errorf("%d KiB fetched", n/kiB)
	}
	if n := s.Stats().VerifyFailures; n != 3 {
		t.Errorf("%d verify failures", n)
	}
	if n := ia.Size() - ia.Present(); n != 3*64*kiB {
		t.Errorf("%d KiB missing of the first image", n/kiB)
	}
	before := srcA.Bytes()
	sameAll(t, ia, a.Plain, 100_000)
	if srcA.Bytes() != before {
		t.Error("fetched what the second image has")
	}
}

// What a failed sync has lost of one image is absent in the other too.
func TestSharedSyncFails(t *testing.T) {
	a, b := versions()
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s, disk := openFailing(t, cfg)
	src := storetest.NewSource("good", a, b)
	ia, ib := openImage(t, s, a, src), openImage(t, s, b, src)
	check(t, ia.Prefetch(context.Background(), firstChunk+miB, 2*miB)) // behind 5 MiB of b
	fill(t, ib)
	lose := func() {
		check(t, ib.Prefetch(context.Background(), firstChunk, ib.Size()))
		disk.failNext(0, 8*miB)
		s.Flush()
	}
	lose()
	disk.heal()
	s.Flush()
	sameAll(t, ib, b.Plain, 100_000)
	sameAll(t, ia, a.Plain, 100_000)
	check(t, s.Close())
	s = open(t, cfg)
	sameAll(t, openImage(t, s, a, src), a.Plain, 100_000)
	sameAll(t, openImage(t, s, b, src), b.Plain, 100_000)
}

// Damage to what links need costs a fetch, never wrong bytes.
func TestSharedDamage(t *testing.T) {
	a, b := versions()
	ida, idb := a.Index.Segments[0].ID.Encoded(), b.Index.Segments[0].ID.Encoded()
	truncate := func(name string) error { return os.Truncate(name, 9) }
	cases := map[string]struct {
		file string
		harm func(name string) error
	}{
		"links gone":   {idb + ".links", os.Remove},
		"links short":  {idb + ".links", truncate},
		"bits gone":    {ida + ".bits", os.Remove},
		"bits short":   {ida + ".bits", truncate},
		"data gone":    {ida + ".data", os.Remove},
		"data short":   {ida + ".data", truncate},
		"table gone":   {ida + ".table", os.Remove},
		"table short":  {ida + ".table", truncate},
		"other's bits": {idb + ".bits", os.Remove},
	}
	for name, c := range cases {
		t.Run(name, func(t *testing.T) {
			cfg := store.Config{Dir: t.TempDir(), Keep: true}
			s := open(t, cfg)
			fill(t, openImage(t, s, a, storetest.NewSource("a", a)))
			fill(t, openImage(t, s, b, storetest.NewSource("b", b)))
			check(t, s.Close())
			check(t, c.harm(filepath.Join(cfg.Dir, "segments", c.file)))
			s = open(t, cfg)
			i := openImage(t, s, b, storetest.NewSource("b", b))
			if i.Complete() {
				t.Error("nothing is missing")
			}
			sameAll(t, i, b.Plain, 100_000)
			fill(t, i)
			i = openImage(t, s, a, storetest.NewSource("a", a))
			sameAll(t, i, a.Plain, 100_000)
		})
	}
}

// A complete image file has all its own bytes, whoever else has them.
func TestSharedMaterialize(t *testing.T) {
	a, b := versions()
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s := open(t, cfg)
	ia := openImage(t, s, a, storetest.NewSource("a", a))
	fill(t, ia)
	ib := openImage(t, s, b, storetest.NewSource("b", b))
	fill(t, ib)
	for _, c := range []struct {
		i   *store.Image
		img *storetest.Image
	}{{ib, b}, {ia, a}} {
		name, err := c.i.Materialize(context.Background())
		check(t, err)
		got, err := os.ReadFile(name)
		check(t, err)
		if !bytes.Equal(got, c.img.Plain) {
			t.Error("the file differs")
		}
		staysWhole(t, ia, a)
		staysWhole(t, ib, b)
	}
	for _, suffix := range []string{".data", ".bits", ".links"} {
		if n := suffixed(t, cfg.Dir, suffix); n > 0 {
			t.Errorf("%d %s files left", n, suffix)
		}
	}
}

// Readers of several images with the same chunks at once get right bytes.
func TestSharedConcurrently(t *testing.T) {
	var images []*storetest.Image
	parts := storetest.Solid(1, 4*miB).Plain
	for k := range 4 {
		own := storetest.Solid(uint64(10+k), miB).Plain
		at := int64(k) * miB / 2
		images = append(images, storetest.NewImage(strings.Repeat("x", k+1), storetest.Cut(64*kiB, parts[at:at+2*miB], own, parts[:miB])))
	}
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true})
	src := storetest.NewSource("good", images...)
	var wg sync.WaitGroup
	for k, img := range images {
		i := openImage(t, s, img, src)
		for n := range int64(2) {
			wg.Go(func() {
				sameAll(t, i, img.Plain, 50_000+n*30_000)
				if n == 0 && k%2 == 0 {
					check(t, i.Fill(context.Background()))
				}
				sameAll(t, i, img.Plain, 128*kiB)
			})
		}
	}
	wg.Wait()
}

// BenchmarkLinkedHit reads present bytes that are in another segment's file.
func BenchmarkLinkedHit(b *testing.B) {
	old := storetest.Solid(1, 64*miB)
	img := storetest.NewImage("bench", old)
	next := storetest.NewImage("linked", storetest.Cut(64*kiB, old.Plain[32*miB:], old.Plain[:32*miB]))
	s := open(b, store.Config{Dir: b.TempDir(), Keep: true})
	check(b, openImage(b, s, img, storetest.NewSource("good", img)).Fill(context.Background()))
	i := openImage(b, s, next)
	check(b, i.Fill(context.Background()))
	for _, n := range []int64{4 * kiB, 128 * kiB} {
		b.Run(fmt.Sprintf("%dKiB", n/kiB), func(b *testing.B) {
			b.ReportAllocs()
			b.SetBytes(n)
			p := make([]byte, n)
			for k := int64(0); b.Loop(); k++ {
				if _, err := i.ReadAt(context.Background(), p, firstChunk+k*7919*4096%(64*miB-n)&^4095); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
