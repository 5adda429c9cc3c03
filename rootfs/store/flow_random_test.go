package store_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// upstream is a source behind the queues of a host, as registries are.
type upstream struct {
	store.Source
	s     *sched.Scheduler
	bytes *atomic.Int64 // that came, if it is there
}

func (u upstream) Fetch(ctx context.Context, seg *index.Segment, off, n int64) (io.ReadCloser, error) {
	host := u.s.Upstream("registry.example.com")
	end, err := host.Begin(ctx)
	if err != nil {
		return nil, err
	}
	body, err := u.Source.Fetch(ctx, seg, off, n)
	if err != nil {
		end()
		return nil, err
	}
	return &upstreamBody{body, ctx, host, end, u.bytes}, nil
}

type upstreamBody struct {
	io.ReadCloser
	ctx   context.Context
	host  *sched.Upstream
	end   func()
	bytes *atomic.Int64
}

func (b *upstreamBody) Read(p []byte) (int, error) {
	grant, err := b.host.Receive(b.ctx, len(p))
	if err != nil {
		return 0, err
	}
	n, err := b.ReadCloser.Read(p[:grant.N])
	b.host.Received(grant, n)
	if b.bytes != nil {
		b.bytes.Add(int64(n))
	}
	return n, err
}

// FixedRank makes readers have requests made anew.
func (u upstream) FixedRank() bool { return u.Name() == "flaky" }

func (b *upstreamBody) Close() error {
	b.end()
	return b.ReadCloser.Close()
}

// Twelve batch jobs wait for a slow link, and an online reader needs a chunk that one of
// them is fetching: it is fetched once, before nearly everything that the others wait
// for, and the rest of that job's run waits again like the others.
func TestPromotionOvertakes(t *testing.T) {
	s, err := sched.New(sched.Config{Link: 4 << 20})
	check(t, err)
	st := open(t, store.Config{Dir: t.TempDir(), Keep: true, Sched: s})
	var others, mine atomic.Int64
	var cancels []func()
	for k := range 11 {
		img := solid(k+1, miB)
		i := openImage(t, st, img, upstream{storetest.NewSource("other", img), s, &others})
		i.SetFlow(s.Flow("batch", fmt.Sprint("job ", k)))
		cancels = append(cancels, readAside(i, img, sched.Demand, 0, 768*kiB).cancel)
	}
	img := solid(12, miB)
	src := newTelling(img, nil)
	job := openImage(t, st, img, upstream{src, s, &mine})
	job.SetFlow(s.Flow("batch", "job"))
	cancels = append(cancels, readAside(job, img, sched.Demand, 0, 768*kiB).cancel)
	w := <-src.works
	for others.Load() < 512*kiB { // all of them have begun
		time.Sleep(time.Millisecond)
	}

	pod := openImage(t, st, img, upstream{src, s, &mine})
	pod.SetFlow(s.Flow("online", "pod"))
	at, mineAt := others.Load(), mine.Load()
	r := readAside(pod, img, sched.Demand, 512*kiB, 1)
	check(t, r.wait(t))
	theirs, its := others.Load()-at, mine.Load()-mineAt
	t.Logf("while %d bytes came for the online reader, %d came for 11 batch jobs", its, theirs)
	if theirs > 2*its {
		t.Errorf("%d bytes came for batch jobs before the %d for the online reader", theirs, its)
	}
	becomes(t, w, job.Flow(), sched.Demand) // which reads on
	if n := len(src.Requests()); n != 1 || src.Twice() > 0 {
		t.Errorf("%d requests, %d blocks twice", n, src.Twice())
	}
	for _, cancel := range cancels {
		cancel()
	}
}

// Random reads, of random ranks, through handles whose flows change, that are given up
// at random, over sources that fail at random, with little memory: all bytes are right,
// nobody waits for ever, and nothing is left in the end.
func TestRandomFlows(t *testing.T) {
	eachMode(t, func(t *testing.T, cfg store.Config) {
		for seed := range uint64(3) {
			cfg.Dir = t.TempDir()
			randomFlows(t, cfg, seed)
		}
	})
}

func randomFlows(t *testing.T, cfg store.Config, seed uint64) {
	s, err := sched.New(sched.Config{Link: 1 << 30, Classes: []sched.Class{{Name: "online", Share: 90}, {Name: "mid", Share: 5}, {Name: "batch", Share: 5}}})
	check(t, err)
	cfg.Window, cfg.Memory, cfg.Sched = 256*kiB, miB, s
	st := open(t, cfg)
	var handles []*store.Image
	var images []*storetest.Image
	for k := range 9 {
		img := solid(k%3+1, 2*miB)
		flaky, good := storetest.NewSource("flaky", img), storetest.NewSource("good", img)
		rnd := rand.New(rand.NewPCG(seed, uint64(k)))
		var mu sync.Mutex
		flaky.Fault = func(r storetest.Request) storetest.Fault {
			mu.Lock()
			defer mu.Unlock()
			switch rnd.IntN(4) {
			case 0:
				return storetest.Fault{Err: errors.New("refused")}
			case 1:
				return storetest.Fault{EndAt: r.Off + 1 + rnd.Int64N(r.N)}
			}
			return storetest.Fault{}
		}
		images = append(images, img)
		handles = append(handles, openImage(t, st, img, upstream{flaky, s, nil}, upstream{good, s, nil}))
	}
	var wg sync.WaitGroup
	for g := range uint64(8) {
		rnd := rand.New(rand.NewPCG(seed, 100+g))
		wg.Go(func() {
			for range 60 {
				k := rnd.IntN(len(handles))
				randomStep(t, rnd, s, handles[k], images[k])
			}
		})
	}
	wg.Wait()
	for k, i := range handles[:3] {
		sameAll(t, i, images[k].Plain, 300*kiB)
	}
	for _, i := range handles {
		check(t, i.Close())
	}
	if err := st.Idle(); err != nil {
		t.Errorf("seed %d: %v", seed, err)
	}
}

func randomStep(t *testing.T, rnd *rand.Rand, s *sched.Scheduler, i *store.Image, img *storetest.Image) {
	ctx, cancel := context.WithCancel(sched.WithRank(context.Background(), sched.Rank(rnd.IntN(3))))
	defer cancel()
	if rnd.IntN(3) == 0 {
		defer time.AfterFunc(time.Duration(rnd.IntN(2000))*time.Microsecond, cancel).Stop()
	}
	off := rnd.Int64N(int64(len(img.Plain)))
	n := min(1+rnd.Int64N(300*kiB), int64(len(img.Plain))-off)
	var err error
	switch rnd.IntN(10) {
	case 0:
		i.SetFlow(s.Flow([]string{"online", "mid", "batch"}[rnd.IntN(3)], fmt.Sprint(rnd.IntN(3))))
	case 1:
		i.SetFlow(nil)
	case 2:
		err = i.Prefetch(ctx, off, n)
	default:
		p := make([]byte, n)
		if _, err = i.ReadAt(ctx, p, off); err == nil && string(p) != string(img.Plain[off:off+n]) {
			t.Errorf("%d wrong bytes at %d", n, off)
		}
	}
	if err != nil && ctx.Err() == nil {
		t.Error(err)
	}
}
