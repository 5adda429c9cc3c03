package store_test

import (
	"context"
	"sync"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

func ingest(t *testing.T, s *store.Store, seg storetest.Segment) index.ID {
	t.Helper()
	in, err := s.Ingest(context.Background())
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
