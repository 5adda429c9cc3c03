package store_test

import (
	"bytes"
	"context"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// mappedHere reads all that Map gives of an image, compares it with its bytes and
// returns how much it is.
func mappedHere(t *testing.T, i *store.Image, plain []byte) int64 {
	t.Helper()
	total := int64(0)
	for off := int64(0); off < i.Size(); {
		m := i.Map(context.Background(), off, i.Size()-off)
		if m.N == 0 {
			off += 4 * kiB
			continue
		}
		got := make([]byte, m.N)
		_, err := m.File.ReadAt(got, m.Off)
		check(t, err)
		if !m.Valid() || !bytes.Equal(got, plain[off:off+m.N]) {
			t.Errorf("wrong or invalid bytes: %d at %d", m.N, off)
		}
		total, off = total+m.N, off+m.N
	}
	return total
}

func TestMapped(t *testing.T) {
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true})
	img := storetest.NewImage("mapped", storetest.Solid(1, 4*miB), storetest.Solid(2, miB))
	i := openImage(t, s, img, storetest.NewSource("good", img))
	for _, tc := range []struct{ off, n int64 }{{-1, 10}, {0, 10}, {i.Size(), 1}, {firstChunk, 0}, {firstChunk, -1}, {firstChunk, 10}} {
		if m := i.Map(context.Background(), tc.off, tc.n); m.N != 0 {
			t.Errorf("%+v: %d bytes of nothing", tc, m.N)
		}
	}
	check(t, i.Prefetch(context.Background(), firstChunk, miB))
	if n := mappedHere(t, i, img.Plain); n != miB {
		t.Errorf("%d KiB mapped, want 1024", n/kiB)
	}
	if m := i.Map(context.Background(), firstChunk+5, 100); m.N != 100 {
		t.Errorf("%d bytes of 100", m.N)
	}
	_, err := i.Materialize(context.Background())
	check(t, err)
	if n := mappedHere(t, i, img.Plain); n != 5*miB {
		t.Errorf("%d KiB mapped of a complete image", n/kiB)
	}
	keeps := open(t, store.Config{Dir: t.TempDir()})
	none := openImage(t, keeps, img, storetest.NewSource("good", img))
	same(t, none, img.Plain, firstChunk, miB)
	if n := mappedHere(t, none, img.Plain); n != 0 {
		t.Errorf("%d bytes mapped of a store that keeps none", n)
	}
}

// Linked chunks are mapped where they are, and what was mapped is not valid any more
// when chunks move to where others have them, which gives disk back.
func TestMappedLinked(t *testing.T) {
	a, b := versions()
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true})
	ia, ib := openImage(t, s, a, storetest.NewSource("a", a)), openImage(t, s, b, storetest.NewSource("b", b))
	fill(t, ia)
	fill(t, ib)
	if n := mappedHere(t, ib, b.Plain); n != 8*miB {
		t.Errorf("%d KiB mapped of an image with links", n/kiB)
	}
	check(t, ib.Close())
	check(t, s.Remove(b.Index.Manifest))
	ib = openImage(t, s, b, storetest.NewSource("b", b))
	check(t, ia.Close())
	check(t, s.Remove(a.Index.Manifest))
	check(t, ib.Prefetch(context.Background(), firstChunk, 64*kiB))
	before := ib.Map(context.Background(), firstChunk, 64*kiB)
	if before.N == 0 || !before.Valid() {
		t.Fatalf("%+v", before)
	}
	g := b.Index.Segments[0]
	ia = openImage(t, s, a, storetest.NewSource("a", a))
	fill(t, ia)
	ingest(t, s, storetest.Segment{Table: g.Table, Plain: b.Plain[g.Off:g.End()]})
	eventually(t, func() bool { return !before.Valid() })
	if n := mappedHere(t, ib, b.Plain); n != 8*miB {
		t.Errorf("%d KiB mapped after chunks moved", n/kiB)
	}
}

// What shares a page with another chunk is not mapped: punching that one would change
// the page.
func TestMappedAlone(t *testing.T) {
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true})
	odd := storetest.Cut(10_000, storetest.Solid(3, miB).Plain)
	img := storetest.NewImage("odd", odd)
	i := openImage(t, s, img, storetest.NewSource("good", img))
	fill(t, i)
	alone := int64(0)
	chunks := odd.Table.Chunks
	for k, c := range chunks {
		if c.Off%index.BlockSize == 0 && (k+1 == len(chunks) || chunks[k+1].Off%index.BlockSize == 0) {
			alone += c.Len
		}
	}
	if n := mappedHere(t, i, img.Plain); n != alone || alone > miB/10 {
		t.Errorf("%d bytes mapped, %d are alone", n, alone)
	}
	sameAll(t, i, img.Plain, 64*kiB)
}

// What is sent from the file is used as what is read.
func TestMappedIsUse(t *testing.T) {
	cfg := store.Config{Dir: memoryDir(t), Keep: true}
	s := openSmall(t, cfg)
	sent, scanned := solid(1, 2*miB), solid(2, 2*miB)
	src := storetest.NewSource("good", sent, scanned)
	for range 2 { // two uses protect it
		i := openImage(t, s, sent, src)
		check(t, i.Fill(context.Background()))
		if n := mappedHere(t, i, sent.Plain); n != 2*miB {
			t.Errorf("%d bytes mapped", n)
		}
		check(t, i.Close())
	}
	useAll(t, s, scanned, false, src)
	s.Press() // one extent goes
	settle(t, s)
	wantPresent(t, s, sent, all(sent))
}
