package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/shared"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// crowd is several users of one small store, who open, read, fill, share, close and
// remove images that have most of their chunks in common, while bytes are given up
// all the time.
type crowd struct {
	cfg    store.Config
	s      *store.Store
	images []*storetest.Image
	src    *storetest.Source
	lossy  bool // the disk fails at times, so that even what is open may be lost

	mu    sync.Mutex
	stale []sharedRead // of images that may be closed by now
}

type sharedRead struct {
	seg   *shared.Segment
	plain []byte
}

func newCrowd(t *testing.T, seed uint64, dir string) *crowd {
	c := &crowd{
		cfg:    store.Config{Dir: dir, Keep: true, Window: 128 * kiB, Quota: 6 * miB, High: 3 * miB, Low: 2 * miB, Sched: schedule},
		images: newWorld(t, seed).images,
	}
	c.src = storetest.NewSource("good", c.images...)
	c.open(t)
	return c
}

func (c *crowd) open(t *testing.T) {
	var err error
	c.s, err = store.OpenExtents(c.cfg, 128*kiB)
	check(t, err)
	c.s.SetFillPatience(10 * time.Millisecond)
}

// close closes the store, then what it shared.
func (c *crowd) close(t *testing.T) {
	check(t, c.s.Close())
	for _, r := range c.stale {
		check(t, r.seg.Close())
	}
	c.stale = nil
}

// work is what one user does, n times, or until ctx ends.
func (c *crowd) work(ctx context.Context, rnd *rand.Rand, n int) error {
	for range n {
		if ctx.Err() != nil {
			return nil
		}
		var err error
		switch k := rnd.IntN(len(c.images)); rnd.IntN(12) {
		case 0:
			_, err = c.s.GC()
		case 1:
			if err = c.s.Remove(c.images[k].Index.Manifest); errdefs.IsNotFound(err) || errdefs.IsFailedPrecondition(err) {
				err = nil
			}
		case 2:
			c.s.SetPinned(c.images[k].Index.Manifest)
		case 3:
			c.s.Flush()
		case 4:
			c.s.Press()
		case 5:
			err = c.ingest(k, rnd)
		default:
			err = c.use(ctx, k, rnd)
		}
		if c.lossy && errors.Is(err, unix.EIO) {
			err = nil
		}
		if err == nil {
			err = c.readStale(rnd)
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func (c *crowd) ingest(k int, rnd *rand.Rand) error {
	img := c.images[k]
	g := img.Index.Segments[rnd.IntN(len(img.Index.Segments))]
	in, err := c.s.Ingest(context.Background())
	if err != nil {
		return err
	}
	defer in.Abort()
	if _, err := in.Write(img.Plain[g.Off:g.End()]); err != nil {
		return err
	}
	_, err = in.Commit(g.Table)
	return err
}

// use opens an image, does things with it and closes it. What it has does not get
// less meanwhile, unless it is batch's.
func (c *crowd) use(ctx context.Context, k int, rnd *rand.Rand) error {
	img := c.images[k]
	i, err := c.s.OpenImage(ctx, img.Index, []store.Source{c.src})
	if err != nil {
		return err
	}
	defer i.Close()
	batch := rnd.IntN(3) == 0
	i.SetFlow(flowOf(batch))
	before := i.Present()
	for range 1 + rnd.IntN(12) {
		switch rnd.IntN(10) {
		case 0:
			if err = i.Fill(ctx); errdefs.IsResourceExhausted(err) {
				err = nil
			}
		case 1:
			err = c.share(i, img, rnd)
		case 2:
			err = c.materialize(ctx, i, img)
		default:
			err = c.read(ctx, i, img, rnd)
		}
		if err != nil || ctx.Err() != nil {
			return err
		}
		now := i.Present()
		if now < before && !batch && !c.lossy {
			return fmt.Errorf("an open image lost %d bytes", before-now)
		}
		before = now
	}
	return nil
}

func (c *crowd) read(ctx context.Context, i *store.Image, img *storetest.Image, rnd *rand.Rand) error {
	off := rnd.Int64N(i.Size())
	got := bytes.Repeat([]byte{0xa5}, int(min(1+rnd.Int64N(300*kiB), i.Size()-off)))
	n, err := i.ReadAt(ctx, got, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return fmt.Errorf("read at %d: %w", off, err)
	}
	if want := img.Plain[off : off+int64(n)]; !bytes.Equal(got[:n], want) {
		return fmt.Errorf("%d bytes at %d are wrong, %d of them zeros", n, off, bytes.Count(got[:n], []byte{0}))
	}
	return nil
}

func (c *crowd) materialize(ctx context.Context, i *store.Image, img *storetest.Image) error {
	name, err := i.Materialize(ctx)
	if errdefs.IsResourceExhausted(err) || errdefs.IsUnavailable(err) || errors.Is(err, context.Canceled) {
		return nil
	}
	if err != nil {
		return err
	}
	got, err := os.ReadFile(name)
	if err == nil && !bytes.Equal(got, img.Plain) {
		err = errors.New("the complete file is wrong")
	}
	return err
}

// share shares a segment; others read it even after the image was closed.
func (c *crowd) share(i *store.Image, img *storetest.Image, rnd *rand.Rand) error {
	k := rnd.IntN(len(img.Index.Segments))
	s, err := i.Share(k)
	if errdefs.IsFailedPrecondition(err) {
		return nil
	}
	if err != nil {
		return err
	}
	seg, err := shared.Open(s.State, s.Data, s.Off)
	if err != nil {
		return err
	}
	g := img.Index.Segments[k]
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.stale = append(c.stale, sharedRead{seg, img.Plain[g.Off:g.End()]}); len(c.stale) > 20 {
		err = c.stale[0].seg.Close()
		c.stale = c.stale[1:]
	}
	return err
}

// readStale reads through a share as another process does.
func (c *crowd) readStale(rnd *rand.Rand) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, r := range c.stale {
		off := rnd.Int64N(r.seg.Size())
		f, at, n, stamp := r.seg.Map(off)
		got := make([]byte, min(n, 300*kiB))
		m, err := f.ReadAt(got, at)
		if n == 0 || !r.seg.Valid(stamp) {
			continue
		}
		if err != nil || !bytes.Equal(got[:m], r.plain[off:off+int64(m)]) {
			return fmt.Errorf("shared: %d bytes at %d are wrong, %d of them zeros: %w", m, off, bytes.Count(got[:m], []byte{0}), err)
		}
	}
	return nil
}

// verify reads all of everything, and counts what is there.
func (c *crowd) verify(t *testing.T) {
	t.Helper()
	for _, img := range c.images {
		i, err := c.s.OpenImage(context.Background(), img.Index, []store.Source{c.src})
		check(t, err)
		sameAll(t, i, img.Plain, 200_000)
		check(t, i.Close())
	}
	settle(t, c.s)
	c.s.Flush()
	if got, want := c.s.Space().Used, disk(t, c.cfg); got != want {
		t.Errorf("%d bytes are counted, the disk has %d", got, want)
	}
}

// Readers, shares of other processes, links, ingests, complete files, removals and
// pins at the same time as bytes are given up, also bytes of images that only batch has
// open: no byte is wrong, nothing that online has open loses any, and what is counted
// is what the disk has.
func TestEvictRandomly(t *testing.T) {
	for seed := range uint64(3) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			c := newCrowd(t, seed, memoryDir(t))
			if c.lossy = seed == 2; c.lossy {
				defer failAtTimes(c.s)()
			}
			eg, ctx := errgroup.WithContext(context.Background())
			for k := range uint64(6) {
				eg.Go(func() error { return c.work(ctx, rand.New(rand.NewPCG(seed, k)), 30) })
			}
			check(t, eg.Wait())
			t.Logf("%+v, %d bytes fetched", c.s.Space(), c.src.Bytes())
			if c.s.Space().Evicted < 1*miB {
				t.Error("nothing much was given up")
			}
			c.s.SetPinned()
			if !c.lossy {
				c.verify(t)
			}
			c.close(t)
			c.open(t)
			c.verify(t)
			c.close(t)
		})
	}
}

// failAtTimes makes syncs fail now and then until the result is called.
func failAtTimes(s *store.Store) (stop func()) {
	disk, done := &failingDisk{}, make(chan struct{})
	s.SetSync(disk.sync)
	var wg sync.WaitGroup
	wg.Go(func() {
		for tick := time.NewTicker(10 * time.Millisecond); ; {
			select {
			case <-done:
				tick.Stop()
				disk.heal()
				return
			case <-tick.C:
				disk.failNext(0, 0)
			}
		}
	})
	return func() { close(done); wg.Wait() }
}

// The same, killed again and again: whatever the next process finds is right.
func TestEvictKilled(t *testing.T) {
	if os.Getenv(childRole) == "crowd" {
		c := newCrowd(t, 1, os.Getenv(childDir))
		var eg errgroup.Group
		for k := range 4 {
			eg.Go(func() error {
				return c.work(context.Background(), rand.New(rand.NewPCG(uint64(os.Getpid()), uint64(k))), 1<<30)
			})
		}
		check(t, eg.Wait()) // never
		return
	}
	dir := memoryDir(t)
	null, err := os.Open(os.DevNull)
	check(t, err)
	defer null.Close()
	rnd := rand.New(rand.NewPCG(1, 2))
	for life := range 12 {
		cmd, said := startRole(t, "crowd", dir, null, nil)
		ended := make(chan error, 1)
		go func() { ended <- cmd.Wait() }()
		select {
		case err := <-ended:
			t.Fatalf("life %d ended: %v\n%s", life, err, said)
		case <-time.After(150*time.Millisecond + time.Duration(rnd.Int64N(int64(300*time.Millisecond)))):
		}
		check(t, cmd.Process.Kill())
		if err := <-ended; err == nil {
			t.Error("a store that was killed ended well")
		}
		if life%3 != 2 {
			continue
		}
		c := newCrowd(t, 1, dir)
		c.s.Surveyed()
		c.verify(t)
		c.close(t)
	}
}
