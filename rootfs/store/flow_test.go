package store_test

import (
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// telling is a source that tells of the work of each request.
type telling struct {
	*storetest.Source
	works chan *sched.Work
}

func newTelling(img *storetest.Image, fault func(storetest.Request) storetest.Fault) *telling {
	src := storetest.NewSource("telling", img)
	src.Fault = fault
	return &telling{src, make(chan *sched.Work, 1000)}
}

func (s *telling) Fetch(ctx context.Context, seg *index.Segment, off, n int64) (io.ReadCloser, error) {
	s.works <- sched.From(ctx)
	return s.Source.Fetch(ctx, seg, off, n)
}

// reading is a read under way.
type reading struct {
	cancel context.CancelFunc
	done   chan error
}

// readAside reads n bytes at off of the first segment and compares them.
func readAside(i *store.Image, img *storetest.Image, rank sched.Rank, off, n int64) *reading {
	ctx, cancel := context.WithCancel(sched.WithRank(context.Background(), rank))
	r := &reading{cancel, make(chan error, 1)}
	go func() {
		p := make([]byte, n)
		_, err := i.ReadAt(ctx, p, firstChunk+off)
		if err == nil && string(p) != string(img.Plain[firstChunk+off:firstChunk+off+n]) {
			err = errors.New("wrong bytes")
		}
		r.done <- err
	}()
	return r
}

// wait returns how a read has ended.
func (r *reading) wait(t *testing.T) error {
	t.Helper()
	select {
	case err := <-r.done:
		return err
	case <-time.After(30 * time.Second):
		t.Fatal("a read waits for ever")
		return nil
	}
}

// becomes waits until work has a standing.
func becomes(t *testing.T, w *sched.Work, f *sched.Flow, r sched.Rank) {
	t.Helper()
	want := sched.Standing{Flow: f, Rank: r}
	for end := time.Now().Add(30 * time.Second); w.Standing() != want; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			got := w.Standing()
			t.Fatalf("the fetch counts as %s of class %q, want %s of %q", got.Rank, got.Flow.Class().Name, r, f.Class().Name)
		}
	}
}

// A fetch counts as what the most important of its readers wants, as long as that one
// waits; it is made once.
func TestStanding(t *testing.T) {
	eachMode(t, func(t *testing.T, cfg store.Config) {
		img := storetest.NewImage("standing", storetest.Solid(1, miB))
		first, second, third, end := make(chan struct{}), make(chan struct{}), make(chan struct{}), make(chan struct{})
		holds := map[int64]<-chan struct{}{0: first, 64 * kiB: second, 128 * kiB: third, 192 * kiB: end}
		src := newTelling(img, nil)
		held := holding{src, holds}
		cfg.Sched = schedule
		s := open(t, cfg)
		job, pod := openImage(t, s, img, held), openImage(t, s, img, held)
		batch, online := flowOf(true), flowOf(false)
		job.SetFlow(batch)
		pod.SetFlow(online)

		ahead := make(chan error, 1)
		go func() { ahead <- job.Prefetch(context.Background(), firstChunk, miB) }()
		w := <-src.works
		becomes(t, w, batch, sched.Prefetch)
		a := readAside(job, img, sched.Demand, 0, 1)
		becomes(t, w, batch, sched.Demand)
		b := readAside(pod, img, sched.Background, 128*kiB, 1) // batch waits: that comes first
		c := readAside(pod, img, sched.Demand, 64*kiB, 1)
		becomes(t, w, online, sched.Demand)
		d := readAside(pod, img, sched.Demand, 128*kiB, 1)
		close(first)
		check(t, a.wait(t))
		becomes(t, w, online, sched.Demand)
		close(second)
		check(t, c.wait(t))
		becomes(t, w, online, sched.Demand) // for d
		d.cancel()
		if err := d.wait(t); !errors.Is(err, context.Canceled) {
			t.Errorf("a read that was cancelled: %v", err)
		}
		becomes(t, w, batch, sched.Prefetch)
		e := readAside(job, img, sched.Demand, 128*kiB, 1)
		becomes(t, w, batch, sched.Demand)
		job.SetFlow(online) // what waits is asked for as that from now on
		becomes(t, w, online, sched.Demand)
		job.SetFlow(batch)
		becomes(t, w, batch, sched.Demand)
		close(third)
		check(t, errors.Join(b.wait(t), e.wait(t)))
		becomes(t, w, batch, sched.Prefetch)
		close(end)
		check(t, <-ahead)
		if n := len(src.Requests()); n != 1 || src.Twice() > 0 {
			t.Errorf("%d requests, %d blocks twice", n, src.Twice())
		}
	})
}

// holding is a source that sends no byte from some offsets on before their channels
// are closed.
type holding struct {
	*telling
	holds map[int64]<-chan struct{}
}

func (s holding) Fetch(ctx context.Context, seg *index.Segment, off, n int64) (io.ReadCloser, error) {
	body, err := s.telling.Fetch(ctx, seg, off, n)
	return &heldBody{body, ctx, off, s.holds}, err
}

type heldBody struct {
	io.ReadCloser
	ctx   context.Context
	at    int64
	holds map[int64]<-chan struct{}
}

func (b *heldBody) Read(p []byte) (int, error) {
	if hold := b.holds[b.at]; hold != nil {
		select {
		case <-hold:
		case <-b.ctx.Done():
			return 0, b.ctx.Err()
		}
	}
	next := (b.at/(64*kiB) + 1) * 64 * kiB
	n, err := b.ReadCloser.Read(p[:min(int64(len(p)), next-b.at)])
	b.at += int64(n)
	return n, err
}

// A reader who waits for a chunk far behind splits the fetch; both halves go on as
// the job that they were begun for when nobody else waits.
func TestSplitKeepsItsStanding(t *testing.T) {
	img := storetest.NewImage("split", storetest.Solid(1, 4*miB))
	near, far, end := make(chan struct{}), make(chan struct{}), make(chan struct{})
	src := newTelling(img, nil)
	held := holding{src, map[int64]<-chan struct{}{0: near, 3 * miB: far, 3*miB + 64*kiB: end, 4*miB - 64*kiB: end}}
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true, Sched: schedule})
	job, pod := openImage(t, s, img, held), openImage(t, s, img, held)
	batch, online := flowOf(true), flowOf(false)
	job.SetFlow(batch)
	pod.SetFlow(online)
	ahead := make(chan error, 1)
	go func() { ahead <- job.Prefetch(context.Background(), firstChunk, 4*miB) }()
	one := <-src.works
	late := readAside(job, img, sched.Demand, 4*miB-1, 1) // which splits it, too
	two := <-src.works
	becomes(t, two, batch, sched.Demand)
	r := readAside(pod, img, sched.Demand, 3*miB, 1)
	three := <-src.works
	becomes(t, three, online, sched.Demand)
	becomes(t, one, batch, sched.Prefetch)
	close(far)
	check(t, r.wait(t))
	becomes(t, three, batch, sched.Prefetch)
	close(near)
	close(end)
	check(t, errors.Join(late.wait(t), <-ahead))
	if src.Twice() > 0 {
		t.Errorf("%d blocks were fetched twice", src.Twice())
	}
}

// What a demand read does not wait for is prefetched, and what is read in advance has
// no higher rank than who reads.
func TestRanksOfWindows(t *testing.T) {
	for _, tc := range []struct {
		name         string
		read, window sched.Rank
	}{
		{"demand", sched.Demand, sched.Prefetch},
		{"prefetch", sched.Prefetch, sched.Prefetch},
		{"background", sched.Background, sched.Background},
	} {
		t.Run(tc.name, func(t *testing.T) {
			img := storetest.NewImage("ranks", storetest.Solid(1, 16*miB))
			first, rest := make(chan struct{}), make(chan struct{})
			src := newTelling(img, nil)
			held := holding{src, map[int64]<-chan struct{}{0: first, 64 * kiB: rest, miB: rest, 2 * miB: rest}}
			i := openImage(t, open(t, store.Config{Dir: t.TempDir(), Keep: true, Sched: schedule}), img, held)
			i.SetFlow(flowOf(false))
			r := readAside(i, img, tc.read, 0, 1)
			w := <-src.works
			becomes(t, w, flowOf(false), tc.read)
			close(first)
			check(t, r.wait(t))
			becomes(t, w, flowOf(false), tc.window)
			close(rest)
			for off := int64(0); off < 2*miB; off += 128 * kiB {
				check(t, readAside(i, img, tc.read, off, 128*kiB).wait(t))
			}
			for n := len(src.works); n > 0; n-- {
				becomes(t, <-src.works, flowOf(false), tc.window)
			}
		})
	}
}

// What Fill fetches is background; a prefetch of the same is more urgent.
func TestRankOfFill(t *testing.T) {
	img := storetest.NewImage("fill", storetest.Solid(1, miB))
	hold := make(chan struct{})
	src := newTelling(img, func(storetest.Request) storetest.Fault { return storetest.Fault{Wait: hold} })
	i := openImage(t, open(t, store.Config{Dir: t.TempDir(), Keep: true, Sched: schedule}), img, src)
	i.SetFlow(flowOf(true))
	filled, ahead := make(chan error, 1), make(chan error, 1)
	go func() { filled <- i.Fill(context.Background()) }()
	w := <-src.works
	becomes(t, w, flowOf(true), sched.Background)
	go func() { ahead <- i.Prefetch(context.Background(), firstChunk, 1) }()
	becomes(t, w, flowOf(true), sched.Prefetch)
	close(hold)
	check(t, errors.Join(<-ahead, <-filled))
}

// A source that waits for its turn longer than it may be silent is not given up.
func TestWaitingIsNoStall(t *testing.T) {
	s, err := sched.New(sched.Config{})
	check(t, err)
	img := storetest.NewImage("turn", storetest.Solid(1, 64*kiB))
	src := queued{newTelling(img, nil), s.CPU()}
	i := openImage(t, open(t, store.Config{Dir: t.TempDir(), Keep: true, Sched: s, Stall: 20 * time.Millisecond}), img, src)
	var leaves []func()
	for len(leaves) < 64 { // all turns there are
		ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
		leave, err := s.CPU().Enter(ctx)
		cancel()
		if err != nil {
			break
		}
		leaves = append(leaves, leave)
	}
	r := readAside(i, img, sched.Demand, 0, 1)
	w := <-src.works
	for end := time.Now().Add(30 * time.Second); !w.Waiting() && time.Now().Before(end); {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(100 * time.Millisecond) // several times the stall
	for _, leave := range leaves {
		leave()
	}
	check(t, r.wait(t))
	if n := len(src.Requests()); n != 1 {
		t.Errorf("%d requests", n)
	}
}

// queued waits for a turn before each read.
type queued struct {
	*telling
	queue *sched.Slots
}

func (s queued) Fetch(ctx context.Context, seg *index.Segment, off, n int64) (io.ReadCloser, error) {
	body, err := s.telling.Fetch(ctx, seg, off, n)
	return queuedBody{body, ctx, s.queue}, err
}

type queuedBody struct {
	io.ReadCloser
	ctx   context.Context
	queue *sched.Slots
}

func (b queuedBody) Read(p []byte) (int, error) {
	leave, err := b.queue.Enter(b.ctx)
	if err != nil {
		return 0, err
	}
	defer leave()
	return b.ReadCloser.Read(p)
}

// An online reader joins a fetch of a batch job whose source breaks off: it tries its own.
func TestPromotedFetchFails(t *testing.T) {
	img := storetest.NewImage("fails", storetest.Solid(1, miB))
	hold := make(chan struct{})
	bad := newTelling(img, func(storetest.Request) storetest.Fault {
		return storetest.Fault{Wait: hold, Err: errors.New("broken")}
	})
	good := newTelling(img, nil)
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true, Sched: schedule})
	job, pod := openImage(t, s, img, bad), openImage(t, s, img, good)
	job.SetFlow(flowOf(true))
	pod.SetFlow(flowOf(false))
	a := readAside(job, img, sched.Demand, 100*kiB, 1)
	w := <-bad.works
	b := readAside(pod, img, sched.Demand, 100*kiB, 1)
	becomes(t, w, flowOf(false), sched.Demand)
	close(hold)
	if err := a.wait(t); err == nil {
		t.Error("a read of a broken source has no error")
	}
	check(t, b.wait(t))
	becomes(t, <-good.works, flowOf(false), sched.Prefetch)
	st := s.Stats()
	if len(st.Classes) != 3 || st.Classes[1].Class != "batch" || st.Classes[2].Class != "online" {
		t.Fatalf("classes: %+v", st.Classes)
	}
	online := st.Classes[2].Ranks[sched.Demand] // it waited twice
	if online.Misses != 2 || online.MissBytes != 2 || online.Promoted != 1 || online.Wait <= 0 {
		t.Errorf("online: %+v", online)
	}
	if batch := st.Classes[1].Ranks[sched.Demand]; batch.Misses != 1 || batch.Promoted != 0 || st.Misses != 3 {
		t.Errorf("batch: %+v of %d misses", batch, st.Misses)
	}
}

// fixed is a source whose requests cannot become more urgent.
type fixed struct{ *telling }

func (fixed) FixedRank() bool { return true }

// A request that was made for who can wait is made anew when a reader waits for it and
// nothing comes; others are not.
func TestHurry(t *testing.T) {
	for _, tc := range []struct {
		name     string
		fixed    bool
		rank     sched.Rank
		requests int
	}{
		{"fixed", true, sched.Demand, 2},
		{"fixed, prefetch", true, sched.Prefetch, 1},
		{"another source", false, sched.Demand, 1},
	} {
		t.Run(tc.name, func(t *testing.T) {
			img := storetest.NewImage("hurry", storetest.Solid(1, miB))
			hold := make(chan struct{})
			src := newTelling(img, func(r storetest.Request) storetest.Fault {
				if r.Number == 0 {
					return storetest.Fault{HoldAt: 128 * kiB, Hold: hold}
				}
				return storetest.Fault{}
			})
			var from store.Source = src
			if tc.fixed {
				from = fixed{src}
			}
			i := openImage(t, open(t, store.Config{Dir: t.TempDir(), Keep: true}), img, from)
			ahead := make(chan error, 1)
			go func() { ahead <- i.Prefetch(context.Background(), firstChunk, miB) }()
			w := <-src.works
			check(t, readAside(i, img, tc.rank, 64*kiB, 1).wait(t)) // which comes soon enough
			if n := len(src.Requests()); n != 1 {
				t.Fatalf("%d requests", n)
			}
			r := readAside(i, img, tc.rank, 192*kiB, 1)
			becomes(t, w, nil, tc.rank)
			if tc.requests == 1 {
				time.Sleep(3 * store.HurryAfter)
				close(hold)
			}
			check(t, errors.Join(r.wait(t), <-ahead))
			all := src.Requests()
			if len(all) != tc.requests {
				t.Fatalf("%d requests, want %d", len(all), tc.requests)
			}
			if tc.requests == 2 && (all[1].Off != 128*kiB || all[1].N != miB-128*kiB) {
				t.Errorf("the second request is for %d bytes at %d", all[1].N, all[1].Off)
			}
			sameAll(t, i, img.Plain, 300*kiB)
		})
	}
}
