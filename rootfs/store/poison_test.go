package store_test

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// poisonedRead reads the segment behind the bootstrap and wants the reason.
func poisonedRead(t *testing.T, i *store.Image, off int64) {
	t.Helper()
	_, err := i.ReadAt(context.Background(), make([]byte, 4*kiB), off)
	if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "another diffID") {
		t.Errorf("read of a poisoned segment: %v", err)
	}
}

// A poisoned segment fails in all handles, after a restart, and until its last
// image is removed.
func TestPoison(t *testing.T) {
	eachMode(t, func(t *testing.T, cfg store.Config) {
		var log bytes.Buffer
		cfg.Log = slog.New(slog.NewTextHandler(&log, nil))
		bad, good := storetest.Solid(1, miB), storetest.Solid(2, miB)
		a, b := storetest.NewImage("a", bad, good), storetest.NewImage("image b", bad)
		src := storetest.NewSource("good", a, b)
		s := open(t, cfg)
		reason := errors.New("it has another diffID")
		id := bad.Table.ID()
		if err := s.Poison(id, reason); !errdefs.IsNotFound(err) {
			t.Errorf("poison an unknown segment: %v", err)
		}
		ia, ib := openImage(t, s, a, src), openImage(t, s, b, src)
		same(t, ia, a.Plain, firstChunk, 256*kiB)
		check(t, s.Poison(id, reason))
		check(t, s.Poison(id, reason))
		if n := strings.Count(log.String(), "level=ERROR"); n != 1 {
			t.Errorf("%d errors in the log", n)
		}
		poisonedRead(t, ia, firstChunk)
		poisonedRead(t, ib, firstChunk+512*kiB)
		same(t, ia, a.Plain, firstChunk+miB, miB)
		if err := ia.Prefetch(context.Background(), firstChunk, 1); !errdefs.IsDataLoss(err) {
			t.Errorf("prefetch: %v", err)
		}
		if cfg.Keep {
			poisonedFill(t, s, ib, bad)
		}
		check(t, s.Close())

		s = open(t, cfg)
		i, err := s.LoadImage(context.Background(), a.Index.Manifest, []store.Source{src})
		check(t, err)
		poisonedRead(t, i, firstChunk)
		check(t, i.Close())
		check(t, s.Remove(a.Index.Manifest))
		i = openImage(t, s, b, src)
		poisonedRead(t, i, firstChunk)
		check(t, i.Close())
		check(t, s.Remove(b.Index.Manifest))
		sameAll(t, openImage(t, s, b, src), b.Plain, 128*kiB)
	})
}

// poisonedFill wants the ways to get a complete segment to fail.
func poisonedFill(t *testing.T, s *store.Store, i *store.Image, seg storetest.Segment) {
	t.Helper()
	if err := i.Fill(context.Background()); !errdefs.IsDataLoss(err) {
		t.Errorf("fill: %v", err)
	}
	if _, err := i.Materialize(context.Background()); !errdefs.IsDataLoss(err) {
		t.Errorf("materialize: %v", err)
	}
	in, err := s.Ingest()
	check(t, err)
	_, err = in.Write(seg.Plain)
	check(t, err)
	if _, err = in.Commit(seg.Table); !errdefs.IsDataLoss(err) {
		t.Errorf("ingest: %v", err)
	}
}

// An ingested segment without an image can be poisoned; GC removes it.
func TestPoisonWithoutImage(t *testing.T) {
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s := open(t, cfg)
	seg := storetest.Solid(1, miB)
	id := ingest(t, s, seg)
	check(t, s.Poison(id, errors.New("it has another diffID")))
	check(t, s.Close())
	s = open(t, cfg)
	_, err := s.GC()
	check(t, err)
	if left := files(t, cfg.Dir); len(left) > 0 {
		t.Errorf("files left: %v", left)
	}
}

func ingest(t *testing.T, s *store.Store, seg storetest.Segment) index.ID {
	t.Helper()
	in, err := s.Ingest()
	check(t, err)
	_, err = in.Write(seg.Plain)
	check(t, err)
	id, err := in.Commit(seg.Table)
	check(t, err)
	return id
}

// completed collects the calls of Config.Complete.
type completed struct {
	mu  sync.Mutex
	ids []index.ID
}

func (c *completed) add(id index.ID) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ids = append(c.ids, id)
}

func (c *completed) count() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.ids)
}

// Each segment whose last chunk is fetched is reported once; one that is ingested,
// or was complete before, is not. Close waits for the hook.
func TestComplete(t *testing.T) {
	var got completed
	var s *store.Store
	cfg := store.Config{Dir: t.TempDir(), Keep: true, Complete: func(id index.ID) {
		if len(s.Images()) != 1 { // it may use the store
			t.Error("the image is not there")
		}
		got.add(id)
	}}
	img := storetest.NewImage("complete", storetest.Units(1, miB), storetest.Solid(2, 3*miB))
	extra := storetest.Solid(3, miB)
	s = open(t, cfg)
	ingest(t, s, extra)
	i := openImage(t, s, img, storetest.NewSource("good", img))
	same(t, i, img.Plain, 0, firstChunk+miB)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() { sameAll(t, i, img.Plain, 100_000) })
	}
	wg.Wait()
	check(t, i.Fill(context.Background()))
	check(t, s.Close())
	if n := got.count(); n != 2 || got.ids[0] == got.ids[1] {
		t.Errorf("told of %v", got.ids)
	}
	s = open(t, cfg)
	i = openImage(t, s, img, storetest.NewSource("good", img))
	check(t, i.Fill(context.Background()))
	sameAll(t, i, img.Plain, 128*kiB)
	check(t, s.Close())
	if n := got.count(); n != 2 {
		t.Errorf("told %d times after a restart", n)
	}
}
