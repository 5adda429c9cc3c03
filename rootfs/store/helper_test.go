package store_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"log/slog"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

const (
	kiB = int64(1) << 10
	miB = int64(1) << 20
)

// eachMode runs a test for a store that keeps chunks and for one that does not.
func eachMode(t *testing.T, f func(t *testing.T, cfg store.Config)) {
	t.Run("keep", func(t *testing.T) { f(t, store.Config{Dir: t.TempDir(), Keep: true}) })
	t.Run("keep none", func(t *testing.T) { f(t, store.Config{Dir: t.TempDir()}) })
}

// schedule is that of a node with two classes.
var schedule = func() *sched.Scheduler {
	s, err := sched.New(sched.Config{Default: "online", Classes: []sched.Class{{Name: "online", Share: 95}, {Name: "batch", Share: 5}}})
	if err != nil {
		panic(err)
	}
	return s
}()

// flowOf is a sandbox of the online or the batch class.
func flowOf(batch bool) *sched.Flow {
	if batch {
		return schedule.Flow("batch", "job")
	}
	return schedule.Flow("online", "pod")
}

func open(t testing.TB, cfg store.Config) *store.Store {
	t.Helper()
	if testing.Verbose() && cfg.Log == nil {
		cfg.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	}
	s, err := store.Open(cfg)
	check(t, err)
	t.Cleanup(func() { check(t, s.Close()) })
	return s
}

func openImage(t testing.TB, s *store.Store, img *storetest.Image, sources ...store.Source) *store.Image {
	t.Helper()
	i, err := s.OpenImage(context.Background(), img.Index, sources)
	check(t, err)
	t.Cleanup(func() { check(t, i.Close()) })
	return i
}

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// readerAt is an Image or a Segment.
type readerAt interface {
	ReadAt(ctx context.Context, p []byte, off int64) (int, error)
}

// same reads n bytes at off and compares them with plain.
func same(t testing.TB, r readerAt, plain []byte, off, n int64) {
	t.Helper()
	p := bytes.Repeat([]byte{0xa5}, int(n))
	m, err := r.ReadAt(context.Background(), p, off)
	if err != nil && (!errors.Is(err, io.EOF) || off+n <= int64(len(plain))) {
		t.Errorf("read %d bytes at %d: %v", n, off, err)
		return
	}
	want := plain[min(off, int64(len(plain))):min(off+n, int64(len(plain)))]
	if !bytes.Equal(p[:m], want) {
		t.Errorf("read %d bytes at %d: %d bytes that differ from the %d wanted", n, off, m, len(want))
	}
}

// sameAll reads all of r in steps of n bytes.
func sameAll(t testing.TB, r readerAt, plain []byte, n int64) {
	t.Helper()
	for off := int64(0); off < int64(len(plain)) && !t.Failed(); off += n {
		same(t, r, plain, off, n)
	}
}

// firstChunk is where the first segment starts in an image of storetest.
const firstChunk = 3 * 4 * kiB
