package store_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"strings"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// failingDisk is a disk that loses bytes when it is told to fail: as after a
// failed writeback, they read as zeros and the next sync succeeds.
type failingDisk struct {
	mu     sync.Mutex
	fail   bool
	lo, hi int64 // lost bytes of the file
	during func()
}

func (d *failingDisk) sync(f *os.File) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if !d.fail {
		return f.Sync()
	}
	d.fail = false
	if d.during != nil {
		d.during()
	}
	if d.lo == d.hi {
		return unix.EIO
	}
	mode := uint32(unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE)
	return errors.Join(unix.EIO, unix.Fallocate(int(f.Fd()), mode, d.lo, d.hi-d.lo))
}

// failNext makes the next sync lose [lo, hi).
func (d *failingDisk) failNext(lo, hi int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail, d.lo, d.hi = true, lo, hi
}

// heal takes back a failure that no sync has met.
func (d *failingDisk) heal() {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.fail = false
}

// openFailing opens a store whose disk can fail.
func openFailing(t *testing.T, cfg store.Config) (*store.Store, *failingDisk) {
	t.Helper()
	s, d := open(t, cfg), &failingDisk{}
	s.SetSync(d.sync)
	return s, d
}

// What a failed sync has lost is fetched again and never read as zeros, neither
// at once nor after a restart; what was durable before stays.
func TestSyncFails(t *testing.T) { synctest.Test(t, syncFails) }

func syncFails(t *testing.T) {
	var log bytes.Buffer
	cfg := store.Config{Dir: t.TempDir(), Keep: true, Log: slog.New(slog.NewTextHandler(&log, nil))}
	img := storetest.NewImage("sync fails", storetest.Solid(1, 8*miB))
	src := storetest.NewSource("good", img)
	s, disk := openFailing(t, cfg)
	i := openImage(t, s, img, src)
	check(t, i.Prefetch(context.Background(), firstChunk, 2*miB))
	s.Flush()
	for range 2 {
		check(t, i.Prefetch(context.Background(), firstChunk+2*miB, 2*miB))
		disk.failNext(2*miB, 4*miB)
		s.Flush()
		if n := i.Size() - i.Present(); n != 6*miB {
			t.Errorf("%d bytes missing, want 6 MiB", n)
		}
	}
	fetched := src.Bytes()
	same(t, i, img.Plain, firstChunk, 2*miB)
	if src.Bytes() != fetched {
		t.Error("durable chunks were fetched again")
	}
	s.Flush()
	same(t, i, img.Plain, firstChunk, 4*miB)
	s.Flush()
	if n := s.Stats().KeepFailures; n != 2*2*miB/(64*kiB) {
		t.Errorf("%d keep failures", n)
	}
	check(t, s.Close())
	if n := strings.Count(log.String(), "level=ERROR"); n != 1 {
		t.Errorf("%d errors in the log: %s", n, log.String())
	}
	sameAll(t, openImage(t, open(t, cfg), img, src), img.Plain, 128*kiB)
}

// A chunk that becomes present while a sync is failing is dropped with the others:
// that sync may have lost it, and the next one would not say so.
func TestSyncFailsDuringFetch(t *testing.T) { synctest.Test(t, syncFailsDuringFetch) }

func syncFailsDuringFetch(t *testing.T) {
	img := storetest.NewImage("during", storetest.Solid(1, 4*miB))
	src := storetest.NewSource("good", img)
	s, disk := openFailing(t, store.Config{Dir: t.TempDir(), Keep: true})
	i := openImage(t, s, img, src)
	check(t, i.Prefetch(context.Background(), firstChunk, miB))
	disk.during = func() { check(t, i.Prefetch(context.Background(), firstChunk+miB, miB)) }
	disk.failNext(0, 2*miB)
	s.Flush()
	if n := i.Size() - i.Present(); n != 4*miB {
		t.Errorf("%d bytes missing, want all", n)
	}
	check(t, i.Fill(context.Background()))
	sameAll(t, i, img.Plain, 128*kiB)
}

// Readers at work while syncs fail on a disk that loses nothing get right bytes,
// and every chunk comes back.
func TestSyncFailsUnderReaders(t *testing.T) {
	img := storetest.NewImage("under readers", storetest.Solid(1, 4*miB))
	s, disk := openFailing(t, store.Config{Dir: t.TempDir(), Keep: true})
	i := openImage(t, s, img, storetest.NewSource("good", img))
	var wg sync.WaitGroup
	for k := range int64(4) {
		wg.Go(func() {
			for range 20 {
				sameAll(t, i, img.Plain, 64*kiB+k*kiB)
			}
		})
	}
	for range 50 {
		disk.failNext(0, 0)
		s.Flush()
	}
	wg.Wait()
	disk.heal()
	check(t, i.Fill(context.Background()))
	if !i.Complete() {
		t.Error("chunks are missing")
	}
}

// An ingested segment whose sync fails is absent, also after a restart.
func TestIngestSyncFails(t *testing.T) {
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	seg := storetest.Solid(1, 4*miB)
	img := storetest.NewImage("ingest sync fails", seg)
	src := storetest.NewSource("good", img)
	s, disk := openFailing(t, cfg)
	old := openImage(t, s, img, src)
	check(t, old.Prefetch(context.Background(), firstChunk, miB)) // durable in the file before
	s.Flush()
	disk.failNext(0, 4*miB)
	in, err := s.Ingest(context.Background())
	check(t, err)
	_, err = in.Write(seg.Plain)
	check(t, err)
	_, err = in.Commit(seg.Table)
	check(t, err)
	eventually(t, func() bool { return s.Stats().KeepFailures > 0 })
	if n := old.Size() - old.Present(); n != 4*miB {
		t.Errorf("%d bytes missing, want all", n)
	}
	sameAll(t, old, img.Plain, 128*kiB)
	check(t, s.Close())
	sameAll(t, openImage(t, open(t, cfg), img, src), img.Plain, 128*kiB)
}

// Materialize does not copy what the disk has lost, though no sync has said so
// before.
func TestMaterializeSyncFails(t *testing.T) { synctest.Test(t, materializeSyncFails) }

func materializeSyncFails(t *testing.T) {
	img := storetest.NewImage("materialize", storetest.Solid(1, 4*miB))
	s, disk := openFailing(t, store.Config{Dir: t.TempDir(), Keep: true})
	i := openImage(t, s, img, storetest.NewSource("good", img))
	check(t, i.Fill(context.Background()))
	disk.failNext(0, 4*miB)
	if _, err := i.Materialize(context.Background()); !errdefs.IsUnavailable(err) {
		t.Fatalf("materialize: %v", err)
	}
	name, err := i.Materialize(context.Background())
	check(t, err)
	got, err := os.ReadFile(name)
	check(t, err)
	if !bytes.Equal(got, img.Plain) {
		t.Error("the file differs")
	}
}
