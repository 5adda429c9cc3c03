package store_test

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// Two images share a segment: its bytes are fetched once, and stay until the
// second image goes.
func TestSharedSegment(t *testing.T) {
	base := storetest.Solid(1, 4*miB)
	a := storetest.NewImage("a", base, storetest.Units(2, 2*miB))
	b := storetest.NewImage("image b", storetest.Units(3, miB), base)
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s := open(t, cfg)
	src := storetest.NewSource("good", a, b)
	ia, ib := openImage(t, s, a, src), openImage(t, s, b, src)
	var wg sync.WaitGroup
	wg.Go(func() { sameAll(t, ia, a.Plain, 100_000) })
	wg.Go(func() { sameAll(t, ib, b.Plain, 100_000) })
	wg.Wait()
	if src.Twice() > 0 {
		t.Errorf("%d blocks were fetched twice", src.Twice())
	}
	if err := s.Remove(a.Index.Manifest); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("remove while open: %v", err)
	}
	check(t, ia.Close())
	check(t, s.Remove(a.Index.Manifest))
	if err := s.Remove(a.Index.Manifest); !errdefs.IsNotFound(err) {
		t.Errorf("remove again: %v", err)
	}
	sameAll(t, ib, b.Plain, miB)
	if !ib.Complete() {
		t.Error("the other image lost bytes")
	}
	check(t, ib.Close())
	check(t, s.Remove(b.Index.Manifest))
	if left := files(t, cfg.Dir); len(left) > 0 {
		t.Errorf("files left: %v", left)
	}
}

// files lists what images and segments a store has on disk.
func files(t *testing.T, dir string) []string {
	t.Helper()
	var out []string
	for _, sub := range []string{"images", "segments", "shared", "tmp"} {
		entries, err := os.ReadDir(filepath.Join(dir, sub))
		check(t, err)
		for _, e := range entries {
			out = append(out, sub+"/"+e.Name())
		}
	}
	return out
}

// suffixed counts the files with a suffix.
func suffixed(t *testing.T, dir, suffix string) int {
	t.Helper()
	names := files(t, dir)
	return len(slices.DeleteFunc(names, func(n string) bool { return !strings.HasSuffix(n, suffix) }))
}

// The manifest's index may change, but not under a mounted image.
func TestIndexChanges(t *testing.T) {
	keep := storetest.Solid(1, miB)
	old := storetest.NewImage("image", keep, storetest.Solid(2, miB))
	next := storetest.NewImage("image", keep, storetest.Solid(3, 2*miB))
	for _, whole := range []bool{false, true} {
		cfg := store.Config{Dir: t.TempDir(), Keep: true}
		s := open(t, cfg)
		src := storetest.NewSource("good", old, next)
		i := openImage(t, s, old, src)
		check(t, i.Fill(context.Background()))
		if whole {
			_, err := i.Materialize(context.Background())
			check(t, err)
		}
		if _, err := s.OpenImage(context.Background(), next.Index, nil); !errdefs.IsFailedPrecondition(err) {
			t.Errorf("open with another index: %v", err)
		}
		check(t, i.Close())
		i = openImage(t, s, next, src)
		if i.Present() != firstChunk+miB {
			t.Errorf("%d bytes present, want the shared segment's", i.Present())
		}
		sameAll(t, i, next.Plain, 128*kiB)
		check(t, i.Close())
		if n := suffixed(t, cfg.Dir, ".data"); n != 2 {
			t.Errorf("%d segments on disk", n)
		}
		check(t, s.Close())
	}
}

func TestOpenHostile(t *testing.T) {
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true})
	img := storetest.NewImage("hostile", storetest.Solid(1, miB))
	other := storetest.Solid(2, miB)
	img.Index.Segments[0].Table = other.Table // its ID is another's
	if _, err := s.OpenImage(context.Background(), img.Index, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("open image with a foreign table: %v", err)
	}
	if _, err := s.OpenSegment(context.Background(), &img.Index.Segments[0], nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("open segment with a foreign table: %v", err)
	}
	img.Index.Segments[0].Table = nil
	if _, err := s.OpenImage(context.Background(), img.Index, nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("open image without a table: %v", err)
	}
	if _, err := s.OpenSegment(context.Background(), &img.Index.Segments[0], nil); !errdefs.IsInvalidArgument(err) {
		t.Errorf("open segment without a table: %v", err)
	}
}

func TestIngest(t *testing.T) {
	seg := storetest.Units(1, 6*miB)
	img := storetest.NewImage("ingested", seg)
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s := open(t, cfg)
	for range 2 { // the second is a segment that exists already
		in, err := s.Ingest(context.Background())
		check(t, err)
		write(t, in, seg)
		id, err := in.Commit(seg.Table)
		check(t, err)
		if id != seg.Table.ID() {
			t.Errorf("id %s", id)
		}
		in.Abort() // does nothing
	}
	if freed, err := s.GC(); freed != 0 || err != nil {
		t.Errorf("gc of a fresh segment: %d, %v", freed, err)
	}
	i := openImage(t, s, img) // no source
	sameAll(t, i, img.Plain, 128*kiB)
	check(t, s.Close())
	s = open(t, cfg)
	i, err := s.LoadImage(context.Background(), img.Index.Manifest, nil)
	check(t, err)
	sameAll(t, i, img.Plain, 128*kiB)
	check(t, i.Close())
}

// write gives the segment in pieces, its holes as zeros.
func write(t *testing.T, in *store.Ingest, seg storetest.Segment) {
	t.Helper()
	at := int64(0)
	for _, c := range seg.Table.Chunks {
		check(t, in.WriteZeros(c.Off-at))
		_, err := in.Write(seg.Plain[c.Off : c.Off+c.Len/2])
		check(t, err)
		_, err = in.Write(seg.Plain[c.Off+c.Len/2 : c.End()])
		check(t, err)
		at = c.End()
	}
	check(t, in.WriteZeros(seg.Table.Size-at))
}

// A segment that is being read and partly there becomes complete under its
// readers.
func TestIngestOverOpenSegment(t *testing.T) {
	seg := storetest.Solid(1, 8*miB)
	img := storetest.NewImage("open", seg)
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s := open(t, cfg)
	i := openImage(t, s, img, storetest.NewSource("good", img))
	same(t, i, img.Plain, firstChunk, 100)
	s.Flush()
	in, err := s.Ingest(context.Background())
	check(t, err)
	write(t, in, seg)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { sameAll(t, i, img.Plain, 64*kiB) })
	}
	_, err = in.Commit(seg.Table)
	check(t, err)
	wg.Wait()
	if !i.Complete() {
		t.Error("not complete")
	}
}

func TestIngestRefused(t *testing.T) {
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s := open(t, cfg)
	in, err := s.Ingest(context.Background())
	check(t, err)
	_, err = in.Write(make([]byte, 5000))
	check(t, err)
	if _, err := in.Commit(storetest.Solid(1, miB).Table); !errdefs.IsInvalidArgument(err) {
		t.Errorf("commit of too few bytes: %v", err)
	}
	if _, err := in.Write(nil); err == nil {
		t.Error("write after a failed commit")
	}
	in, err = s.Ingest(context.Background())
	check(t, err)
	in.Abort()
	if left := files(t, cfg.Dir); len(left) > 0 {
		t.Errorf("files left: %v", left)
	}
	if _, err := open(t, store.Config{Dir: t.TempDir()}).Ingest(context.Background()); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("ingest without keep: %v", err)
	}
}

func TestGC(t *testing.T) {
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s := open(t, cfg)
	used, orphan := storetest.Solid(1, miB), storetest.Solid(2, 2*miB)
	img := storetest.NewImage("used", used)
	two := storetest.NewImage("orphan", orphan)
	src := storetest.NewSource("good", img, two)
	check(t, openImage(t, s, img, src).Fill(context.Background()))
	g, err := s.OpenSegment(context.Background(), &two.Index.Segments[0], []store.Source{src})
	check(t, err)
	sameAll(t, g, orphan.Plain, miB)
	check(t, g.Fill(context.Background()))
	if freed, err := s.GC(); freed != 0 || err != nil {
		t.Errorf("gc with all in use: %d, %v", freed, err)
	}
	check(t, g.Close())
	if freed, err := s.GC(); freed != 2*miB || err != nil {
		t.Errorf("gc: %d, %v", freed, err)
	}
	if n := suffixed(t, cfg.Dir, ".data"); n != 1 {
		t.Errorf("%d segments on disk", n)
	}
}

// materialize makes the whole file of img and checks it, reading all the time.
func materialize(t *testing.T, i *store.Image, img *storetest.Image) string {
	t.Helper()
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 2 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
					sameAll(t, i, img.Plain, 128*kiB)
				}
			}
		})
	}
	name, err := i.Materialize(context.Background())
	close(stop)
	wg.Wait()
	check(t, err)
	b, err := os.ReadFile(name)
	check(t, err)
	if !bytes.Equal(b, img.Plain) {
		t.Error("the file differs from the image")
	}
	return name
}

func TestMaterialize(t *testing.T) {
	base := storetest.Units(1, 4*miB)
	a := storetest.NewImage("a", base, storetest.Solid(2, 2*miB))
	b := storetest.NewImage("image b", storetest.Files(3, miB, 3*miB, 5), base)
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s := open(t, cfg)
	src := storetest.NewSource("good", a, b)
	ia, ib := openImage(t, s, a, src), openImage(t, s, b, src)
	name := materialize(t, ia, a)
	if n := suffixed(t, cfg.Dir, ".data"); n != 1 { // of b alone
		t.Errorf("%d segments have files of their own", n)
	}
	materialize(t, ib, b)
	if n := suffixed(t, cfg.Dir, ".data") + suffixed(t, cfg.Dir, ".bits"); n != 0 {
		t.Errorf("%d segments have files of their own", n)
	}
	if again := materialize(t, ia, a); again != name {
		t.Errorf("%s, then %s", name, again)
	}
	check(t, s.Close())

	s = open(t, cfg)
	if list := s.Images(); len(list) != 2 || !list[0].Materialized || !list[1].Materialized {
		t.Errorf("images %+v", list)
	}
	ia, err := s.LoadImage(context.Background(), a.Index.Manifest, nil)
	check(t, err)
	sameAll(t, ia, a.Plain, 128*kiB)
	check(t, ia.Close())
	check(t, s.Remove(a.Index.Manifest)) // base lives there: it moves to b
	ib, err = s.LoadImage(context.Background(), b.Index.Manifest, nil)
	check(t, err)
	sameAll(t, ib, b.Plain, 128*kiB)
	check(t, ib.Close())
	check(t, s.Remove(b.Index.Manifest))
	if left := files(t, cfg.Dir); len(left) > 0 {
		t.Errorf("files left: %v", left)
	}
}

// The segments of a removed whole file that another image needs get files of
// their own, also while that image is open.
func TestRemoveMaterialized(t *testing.T) {
	base := storetest.Units(1, 4*miB)
	a := storetest.NewImage("a", base, storetest.Solid(2, miB))
	b := storetest.NewImage("image b", base, storetest.Solid(3, miB))
	for _, opened := range []bool{false, true} {
		cfg := store.Config{Dir: t.TempDir(), Keep: true}
		s := open(t, cfg)
		src := storetest.NewSource("good", a, b)
		ia, ib := openImage(t, s, a, src), openImage(t, s, b, src)
		check(t, ib.Fill(context.Background()))
		materialize(t, ia, a)
		check(t, ia.Close())
		if !opened {
			check(t, ib.Close())
		}
		check(t, s.Remove(a.Index.Manifest))
		if opened {
			sameAll(t, ib, b.Plain, 128*kiB)
		}
		check(t, s.Close())
		s = open(t, cfg)
		ib, err := s.LoadImage(context.Background(), b.Index.Manifest, nil)
		check(t, err)
		sameAll(t, ib, b.Plain, 128*kiB)
		check(t, s.Close())
	}
}

// Materialize can be cut at every step; the next process goes on from there.
func TestMaterializeCut(t *testing.T) {
	img := storetest.NewImage("cut", storetest.Units(1, 2*miB), storetest.Solid(2, miB))
	manifest := img.Index.Manifest.Encoded()
	first, second := img.Index.Segments[0].ID.Encoded(), img.Index.Segments[1].ID.Encoded()
	home := []byte(`{"version":1,"image":"` + img.Index.Manifest.String() + `"}`)
	put := func(t *testing.T, dir, name string, data []byte) {
		check(t, os.WriteFile(filepath.Join(dir, name), data, 0o600))
	}
	cuts := map[string]func(t *testing.T, dir string){
		"while copying": func(t *testing.T, dir string) { put(t, dir, "tmp/image-1", img.Plain[:miB]) },
		"file has its name": func(t *testing.T, dir string) {
			put(t, dir, "images/"+manifest+".erofs", img.Plain)
		},
		"a segment has moved": func(t *testing.T, dir string) {
			put(t, dir, "images/"+manifest+".erofs", img.Plain)
			put(t, dir, "segments/"+first+".home", home)
		},
		"its bits are gone": func(t *testing.T, dir string) {
			put(t, dir, "images/"+manifest+".erofs", img.Plain)
			put(t, dir, "segments/"+first+".home", home)
			check(t, os.Remove(filepath.Join(dir, "segments", first+".bits")))
		},
		"its files are gone": func(t *testing.T, dir string) {
			put(t, dir, "images/"+manifest+".erofs", img.Plain)
			put(t, dir, "segments/"+first+".home", home)
			check(t, os.Remove(filepath.Join(dir, "segments", first+".bits")))
			check(t, os.Remove(filepath.Join(dir, "segments", first+".data")))
		},
		"home without a file": func(t *testing.T, dir string) { put(t, dir, "segments/"+second+".home", home) },
		"file is short": func(t *testing.T, dir string) {
			put(t, dir, "images/"+manifest+".erofs", img.Plain[:miB])
			put(t, dir, "segments/"+first+".home", home)
		},
		"home is damaged": func(t *testing.T, dir string) { put(t, dir, "segments/"+second+".home", home[:9]) },
	}
	for name, cut := range cuts {
		t.Run(name, func(t *testing.T) {
			cfg := store.Config{Dir: t.TempDir(), Keep: true}
			s := open(t, cfg)
			check(t, openImage(t, s, img, storetest.NewSource("good", img)).Fill(context.Background()))
			check(t, s.Close())
			cut(t, cfg.Dir)
			s = open(t, cfg)
			i, err := s.LoadImage(context.Background(), img.Index.Manifest, nil)
			check(t, err)
			sameAll(t, i, img.Plain, 128*kiB)
			if n := suffixed(t, cfg.Dir, ".data"); s.Images()[0].Materialized && n > 0 {
				t.Errorf("%d segments have not moved", n)
			}
			materialize(t, i, img)
			if n := suffixed(t, cfg.Dir, ".data") + suffixed(t, cfg.Dir, ".bits"); n > 0 {
				t.Errorf("files left: %v", files(t, cfg.Dir))
			}
			check(t, i.Close())
		})
	}
}

// On a filesystem with reflinks the whole file takes no room of its own, and
// holes stay holes everywhere.
func TestMaterializeShares(t *testing.T) {
	mkfs, err := exec.LookPath("mkfs.xfs")
	if err != nil || os.Getuid() != 0 {
		t.Skip("needs root and mkfs.xfs: mounts a filesystem with reflinks")
	}
	disk := filepath.Join(t.TempDir(), "disk")
	check(t, os.WriteFile(disk, nil, 0o600))
	check(t, os.Truncate(disk, 400*miB))
	if out, err := exec.CommandContext(t.Context(), mkfs, "-q", disk).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.xfs: %v: %s", err, out)
	}
	dir := mount(t, loopDevice(t, disk), "xfs", "", 0)
	hole := storetest.Segment{Table: &index.Table{Size: 16 * miB}, Plain: make([]byte, 16*miB)}
	img := storetest.NewImage("shares", storetest.Solid(1, 64*miB), hole)
	s := open(t, store.Config{Dir: dir, Keep: true})
	i := openImage(t, s, img, storetest.NewSource("good", img))
	other, err := s.OpenSegment(context.Background(), &img.Index.Segments[0], nil) // its file stays open
	check(t, err)
	check(t, i.Fill(context.Background()))
	check(t, syncFS(dir))
	before := free(t, dir)
	name, err := i.Materialize(context.Background())
	check(t, err)
	check(t, syncFS(dir))
	if took := before - free(t, dir); took > 4*miB {
		t.Errorf("the whole file took %d MiB", took/miB)
	}
	var st unix.Stat_t
	check(t, unix.Stat(name, &st))
	if st.Blocks*512 > 66*miB {
		t.Errorf("the hole became %d MiB", (st.Blocks*512-64*miB)/miB)
	}
	sameAll(t, other, storetest.Solid(1, 64*miB).Plain, 8*miB)
	check(t, other.Close())
	sameAll(t, i, img.Plain, 8*miB)
}

func free(t *testing.T, dir string) int64 {
	t.Helper()
	var st unix.Statfs_t
	check(t, unix.Statfs(dir, &st))
	return int64(st.Bfree) * st.Bsize
}
