package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// openSmall opens a store with extents of 512 KiB, of a node with two classes.
func openSmall(t testing.TB, cfg store.Config) *store.Store {
	t.Helper()
	cfg.Sched = schedule
	if testing.Verbose() && cfg.Log == nil {
		cfg.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	s, err := store.OpenExtents(cfg, 512*kiB)
	check(t, err)
	t.Cleanup(func() { check(t, s.Close()) })
	s.Surveyed()
	return s
}

// settle waits until nothing more is given up.
func settle(t testing.TB, s *store.Store) {
	t.Helper()
	// Two rounds in a row: the end of one that began before may hide the need for another.
	for bound, calm := time.After(30*time.Second), 0; calm < 2; calm++ {
		select {
		case <-s.Look():
		case <-bound:
			t.Fatalf("bytes are given up for ever: %+v", s.Space())
		}
		if !s.Settled() {
			calm = -1
		}
	}
}

// useAll opens an image, reads all of it and closes it.
func useAll(t testing.TB, s *store.Store, img *storetest.Image, batch bool, sources ...store.Source) {
	t.Helper()
	i, err := s.OpenImage(context.Background(), img.Index, sources)
	check(t, err)
	i.SetFlow(flowOf(batch))
	sameAll(t, i, img.Plain, 300*kiB)
	check(t, i.Close())
	settle(t, s)
}

// solid makes an image of one segment without holes.
func solid(n int, size int64) *storetest.Image {
	return storetest.NewImage(strings.Repeat("i", n), storetest.Solid(uint64(n), size))
}

// disk is how many bytes of disk the segments and complete files of a store take.
func disk(t testing.TB, cfg store.Config) (n int64) {
	t.Helper()
	for _, pattern := range []string{"segments/*.data", "images/*.erofs"} {
		names, err := filepath.Glob(filepath.Join(cfg.Dir, pattern))
		check(t, err)
		for _, name := range names {
			var st unix.Stat_t
			check(t, unix.Stat(name, &st))
			n += st.Blocks * 512
		}
	}
	return n
}

// wantPresent compares how many bytes of an image are in the store.
func wantPresent(t testing.TB, s *store.Store, img *storetest.Image, ok func(n int64) bool) {
	t.Helper()
	i, err := s.LoadImage(context.Background(), img.Index.Manifest, nil)
	check(t, err)
	defer i.Close()
	if n := i.Present() - int64(len(img.Index.Bootstrap)); !ok(n) {
		t.Errorf("%d of %d bytes are present", n, i.Size())
	}
}

func all(img *storetest.Image) func(int64) bool {
	return func(n int64) bool { return n == int64(len(img.Plain)-len(img.Index.Bootstrap)) }
}

func none(n int64) bool { return n == 0 }

// Images come one after the other, three times what fits: the store stays below its
// quota, what is counted is what the disk has, and every image stays known and is
// read again.
func TestQuota(t *testing.T) {
	cfg := store.Config{Dir: memoryDir(t), Keep: true, Quota: 8 * miB, High: 5 * miB, Low: 4 * miB}
	s := openSmall(t, cfg)
	var images []*storetest.Image
	for n := range 12 {
		images = append(images, solid(n+1, 2*miB))
	}
	src := storetest.NewSource("good", images...)
	for _, img := range images {
		useAll(t, s, img, false, src)
		if got, want := s.Space().Used, disk(t, cfg); got != want || got > cfg.High {
			t.Fatalf("%d bytes are counted, the disk has %d, the quota is %d", got, want, cfg.Quota)
		}
	}
	if n := s.Space().Evicted; n < 16*miB || len(s.Images()) != len(images) {
		t.Errorf("%d bytes were given up, %d images are known", n, len(s.Images()))
	}
	if n := s.Space().Refused; n > 0 {
		t.Errorf("%d bytes were not kept", n)
	}
	wantPresent(t, s, images[11], all(images[11]))
	wantPresent(t, s, images[0], none)
	for _, img := range images {
		useAll(t, s, img, false, src)
	}
}

// What is open, pinned or was ingested for an image to come stays. When nothing may
// go, everything is read all the same, and there is one line in the log.
func TestNothingMayGo(t *testing.T) {
	var text bytes.Buffer
	cfg := store.Config{Dir: memoryDir(t), Keep: true, Quota: 8 * miB, Log: slog.New(slog.NewTextHandler(&text, nil))}
	s := openSmall(t, cfg)
	pinned, opened, more := solid(1, 2*miB), solid(2, 3*miB), solid(3, 8*miB)
	src := storetest.NewSource("good", pinned, opened, more)
	s.SetPinned(pinned.Index.Manifest)
	useAll(t, s, pinned, false, src)
	ingested := storetest.Solid(9, 1*miB)
	ingest(t, s, ingested)
	i := openImage(t, s, opened, src)
	check(t, i.Fill(context.Background()))
	k := openImage(t, s, more, src)
	for range 3 {
		sameAll(t, k, more.Plain, 300*kiB)
	}
	settle(t, s)
	if !s.Stuck() || s.Space().Refused == 0 || s.Space().Evicted > 0 || s.Stats().KeepFailures == 0 {
		t.Errorf("nothing may go: %+v", s.Space())
	}
	if err := k.Fill(context.Background()); !errdefs.IsResourceExhausted(err) {
		t.Errorf("fill over the quota: %v", err)
	}
	if n := strings.Count(text.String(), "store is full"); n != 1 {
		t.Errorf("%d lines in the log:\n%s", n, text.String())
	}
	if !i.Complete() {
		t.Error("an open image lost bytes")
	}
	wantPresent(t, s, pinned, all(pinned))
	if n := s.Space().Pinned; n != 2*miB {
		t.Errorf("%d bytes are pinned", n)
	}
	check(t, k.Close()) // now there is something
	settle(t, s)
	if s.Stuck() || s.Space().Used > cfg.Quota/100*86 {
		t.Errorf("after an image was closed: %+v", s.Space())
	}
	seg, err := s.OpenSegment(context.Background(), &index.Segment{ID: ingested.Table.ID(), Table: ingested.Table}, nil)
	check(t, err)
	if !seg.Complete() || !i.Complete() {
		t.Error("bytes went that are open or were ingested")
	}
	check(t, seg.Close())
	wantPresent(t, s, pinned, all(pinned))
	s.SetPinned()
	s.Press()
	settle(t, s)
	for range 20 { // a part each time
		s.Press()
		settle(t, s)
	}
	wantPresent(t, s, pinned, none)
	if !i.Complete() {
		t.Error("an open image lost bytes")
	}
}

// Chunks that links of an open image lead to stay, and no others of their segment.
func TestEvictLinkTarget(t *testing.T) {
	for _, pin := range []bool{false, true} {
		t.Run(fmt.Sprint(pin), func(t *testing.T) {
			cfg := store.Config{Dir: memoryDir(t), Keep: true, Quota: 100 * miB}
			s := openSmall(t, cfg)
			a, b := versions()
			useAll(t, s, a, false, storetest.NewSource("good", a))
			i, err := s.OpenImage(context.Background(), b.Index, []store.Source{storetest.NewSource("good", b)})
			check(t, err)
			check(t, i.Fill(context.Background()))
			if s.Stats().SharedBytes == 0 {
				t.Fatal("nothing is shared")
			}
			if pin {
				s.SetPinned(b.Index.Manifest)
				check(t, i.Close())
			}
			before := s.Stats().SharedBytes
			for range 100 {
				s.Press()
				settle(t, s)
			}
			if n := s.Space().Evicted; n == 0 {
				t.Error("nothing of the other image went")
			}
			wantPresent(t, s, b, all(b))
			wantPresent(t, s, a, func(n int64) bool { return n >= before && n < int64(len(a.Plain)-len(a.Index.Bootstrap)) })
			if pin {
				s.SetPinned()
			} else {
				check(t, i.Close())
			}
			for range 200 {
				s.Press()
				settle(t, s)
			}
			wantPresent(t, s, b, none)
			wantPresent(t, s, a, none)
			if n := disk(t, cfg); n != s.Space().Used || n > 64*kiB {
				t.Errorf("%d bytes are left on the disk, %d counted", n, s.Space().Used)
			}
			useAll(t, s, a, false, storetest.NewSource("good", a))
			useAll(t, s, b, false, storetest.NewSource("good", b))
		})
	}
}

// The complete file of an image that is closed goes; that of an open one does not.
func TestEvictComplete(t *testing.T) {
	cfg := store.Config{Dir: memoryDir(t), Keep: true}
	s := openSmall(t, cfg)
	img := storetest.NewImage("complete", storetest.Solid(1, 2*miB), storetest.Solid(2, miB))
	src := storetest.NewSource("good", img)
	i, err := s.OpenImage(context.Background(), img.Index, []store.Source{src})
	check(t, err)
	name, err := i.Materialize(context.Background())
	check(t, err)
	f, err := os.Open(name)
	check(t, err)
	defer f.Close()
	s.Press()
	settle(t, s)
	if _, err := os.Stat(name); err != nil || !i.Complete() {
		t.Errorf("an open image's file: %v", err)
	}
	if got, want := s.Space().Used, disk(t, cfg); got != want || want == 0 {
		t.Errorf("%d bytes are counted, the disk has %d", got, want)
	}
	check(t, i.Close())
	s.Press()
	settle(t, s)
	if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a closed image's file: %v", err)
	}
	got := make([]byte, len(img.Plain))
	if _, err := f.ReadAt(got, 0); err != nil || !bytes.Equal(got, img.Plain) {
		t.Errorf("who has the file open reads %v", err)
	}
	if s.Space().Used != 0 || s.Space().Evicted == 0 {
		t.Errorf("%+v", s.Space())
	}
	if n := suffixed(t, cfg.Dir, ".home"); n > 0 {
		t.Errorf("%d segments live in a file that is gone", n)
	}
	wantPresent(t, s, img, none)
	useAll(t, s, img, false, src)
}

// How an image was used outlives the process, and a crash costs only that.
func TestUseOutlivesStore(t *testing.T) {
	cfg := store.Config{Dir: memoryDir(t), Keep: true, Quota: 8 * miB}
	often, once := solid(1, 2*miB), solid(2, 2*miB)
	src := storetest.NewSource("good", often, once)
	for _, crash := range []bool{false, true} {
		s := openSmall(t, cfg)
		useAll(t, s, often, false, src)
		useAll(t, s, often, false, src)
		useAll(t, s, once, false, src) // later, but once
		check(t, s.Close())
		if crash {
			names, err := filepath.Glob(filepath.Join(cfg.Dir, "segments", "*.use"))
			check(t, err)
			if len(names) != 2 {
				t.Errorf("%d files of uses", len(names))
			}
			for n, name := range names {
				check(t, os.Truncate(name, int64(n*17)))
			}
		}
		s = openSmall(t, cfg)
		if got, want := s.Space().Used, disk(t, cfg); got != want {
			t.Errorf("%d bytes are counted, the disk has %d", got, want)
		}
		for range 3 {
			s.Press()
			settle(t, s)
		}
		if s.Space().Evicted == 0 {
			t.Error("nothing went")
		}
		if !crash {
			wantPresent(t, s, often, all(often))
			wantPresent(t, s, once, func(n int64) bool { return n < 2*miB })
		}
		for range 100 {
			s.Press()
			settle(t, s)
		}
		wantPresent(t, s, often, none)
		if n := s.Space().Used; n != 0 {
			t.Errorf("%d bytes are left", n)
		}
		check(t, s.Close())
	}
}

// A batch job that reads three times the quota costs those images little that are
// used again and again.
func TestBatchScan(t *testing.T) {
	for _, told := range []bool{true, false} {
		cfg := store.Config{Dir: memoryDir(t), Keep: true, Quota: 9 * miB, High: 7 * miB, Low: 6 * miB, Dedup: -1}
		s := openSmall(t, cfg)
		var online, batch []*storetest.Image
		for n := range 4 {
			online = append(online, solid(n+1, miB))
		}
		for n := range 14 {
			batch = append(batch, solid(n+10, 2*miB))
		}
		for range 2 {
			for _, img := range online {
				useAll(t, s, img, false, storetest.NewSource("good", img))
			}
		}
		for _, img := range batch {
			useAll(t, s, img, told, storetest.NewSource("good", img))
		}
		src := storetest.NewSource("good", online...)
		for _, img := range online {
			useAll(t, s, img, false, src)
		}
		if n := src.Bytes(); n > 4*miB/20 {
			t.Errorf("told %v: %d bytes of 4 MiB were fetched again", told, n)
		}
		if sp := s.Space(); sp.Evicted < 22*miB || sp.Refused > miB { // what comes faster than room is made
			t.Errorf("told %v: %+v", told, sp)
		}
		check(t, s.Close())
	}
}

// A disk that is full has bytes given up, also when there is no quota and no room for
// a bitmap.
func TestEvictWhenDiskFull(t *testing.T) {
	dir := mount(t, loopDevice(t, filesystem(t, 24*miB)), "ext4", "", 0)
	cfg := store.Config{Dir: dir, Keep: true, Dedup: -1}
	s := openSmall(t, cfg)
	var images []*storetest.Image
	for n := range 12 {
		images = append(images, solid(n+1, 4*miB))
	}
	for round := range 2 {
		for _, img := range images {
			useAll(t, s, img, false, storetest.NewSource("good", img))
		}
		if s.Space().Evicted < int64(round+1)*5*miB {
			t.Errorf("round %d: %+v", round, s.Space())
		}
	}
	i := openImage(t, s, images[0], storetest.NewSource("good", images[0]))
	for n := 0; ; n++ {
		err := i.Fill(context.Background())
		settle(t, s)
		if err == nil {
			break
		}
		if n > 20 || !errdefs.IsResourceExhausted(err) {
			t.Fatalf("fill: %v", err)
		}
	}
	sameAll(t, i, images[0].Plain, 300*kiB)
}

// terabyte makes the files of a store of 1 TiB: so many images of 10 segments.
func terabyte(t testing.TB, images int) store.Config {
	t.Helper()
	cfg := store.Config{Dir: memoryDir(t), Keep: true, Quota: 1 << 40}
	check(t, store.Simulate(cfg.Dir, images, 10, 112*miB*1000/int64(images)))
	return cfg
}

func heap() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

// A store of 1 TiB opens without reading a table, knows all its extents soon after,
// and takes little memory. (How long that takes, BenchmarkOpenTerabyte says.)
func TestTerabyte(t *testing.T) {
	const images = 200
	cfg := terabyte(t, images)
	before := heap()
	s := open(t, cfg)
	s.Surveyed()
	s.Scanned()
	n := heap() - before
	t.Logf("%d extents take %d MiB of memory", s.Extents(), n/miB)
	if n > 64*miB {
		t.Errorf("%d MiB of memory", n/miB)
	}
	if n := s.Extents(); n < 1<<40/(8<<20) {
		t.Errorf("%d extents are known", n)
	}
	if freed, err := s.GC(); freed != 0 || err != nil || len(s.Images()) != images {
		t.Errorf("gc freed %d of %d images: %v", freed, len(s.Images()), err)
	}
}

// BenchmarkOpenTerabyte opens such a store, looks for what is not used, as a node
// does then, and closes it.
func BenchmarkOpenTerabyte(b *testing.B) {
	cfg := terabyte(b, 1000)
	for b.Loop() {
		s, err := store.Open(cfg)
		check(b, err)
		_, err = s.GC()
		check(b, err)
		b.StopTimer()
		s.Surveyed()
		check(b, s.Close())
		b.StartTimer()
	}
}

// BenchmarkSurvey is how long it takes after that until everything is known.
func BenchmarkSurvey(b *testing.B) {
	cfg := terabyte(b, 1000)
	for b.Loop() {
		s, err := store.Open(cfg)
		check(b, err)
		s.Surveyed()
		check(b, s.Close())
	}
}

// After a restart nothing is given up until it is known what is in use, however full
// the store is; on a full disk nobody waits for that.
func TestHold(t *testing.T) {
	cfg := store.Config{Dir: memoryDir(t), Keep: true, Quota: 8 * miB}
	mounted, other := solid(1, 3*miB), solid(2, 3*miB)
	src := storetest.NewSource("good", mounted, other)
	s := openSmall(t, cfg)
	useAll(t, s, mounted, false, src)
	useAll(t, s, other, false, src)
	check(t, s.Close())
	cfg.Quota, cfg.Hold = 4*miB, true
	s = openSmall(t, cfg)
	i := openImage(t, s, other, src)
	check(t, i.Close())
	s.Press()
	settle(t, s)
	if n := s.Space().Evicted; n > 0 {
		t.Fatalf("%d bytes were given up before anybody could say what is in use", n)
	}
	m := openImage(t, s, mounted)
	s.Release()
	settle(t, s)
	if n := s.Space().Evicted; n == 0 || !m.Complete() {
		t.Errorf("%d bytes were given up; what is mounted is complete: %v", n, m.Complete())
	}
}
