package node

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

func newSched(t *testing.T, cfg sched.Config) *sched.Scheduler {
	t.Helper()
	s, err := sched.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// as returns a context of new work of a class.
func as(t *testing.T, s *sched.Scheduler, class string) context.Context {
	return sched.With(t.Context(), sched.NewWork(sched.Standing{Flow: s.Flow(class, "test")}))
}

// ended is a context in which nothing is waited for.
func ended(ctx context.Context) context.Context {
	ctx, cancel := context.WithCancel(ctx)
	cancel()
	return ctx
}

// TestBuildsOfSlowRegistries has registries whose layers are never done. They hold up
// their own other layers, and what is left for all, but no other registry.
func TestBuildsOfSlowRegistries(t *testing.T) {
	const each = 2
	b := newBuilds(newSched(t, sched.Config{}), each)
	ctx := as(t, b.sched, "online")
	enter := func(registry string) (leave func()) {
		leave, err := b.enter(ctx, registry)
		if err != nil {
			t.Fatal(err)
		}
		return leave
	}
	slow := map[string][]func(){}
	for i := range each * buildsOfAll {
		name := fmt.Sprint("slow", i)
		slow[name] = []func(){enter(name), enter(name)}
	}
	if n := waiting(b.sched, "layers"); n != 0 {
		t.Fatalf("%d wait", n)
	}
	first := enter("other")
	if len(b.from) != len(slow)+1 {
		t.Errorf("%d registries", len(b.from))
	}
	type result struct {
		leave func()
		err   error
	}
	second := make(chan result)
	go func() {
		leave, err := b.enter(ctx, "other")
		second <- result{leave, err}
	}()
	for waiting(b.sched, "layers") == 0 { // all are built that may be beside another one
		time.Sleep(time.Millisecond)
	}
	slow["slow0"][1]()
	if r := <-second; r.err != nil {
		t.Error(r.err)
	} else {
		r.leave()
	}
	first()
	slow["slow0"][0]()
	delete(slow, "slow0")
	for _, leaves := range slow {
		for _, leave := range leaves {
			leave()
		}
	}
	if len(b.from) != 0 || b.first != 0 {
		t.Errorf("%d registries and %d first builds are left", len(b.from), b.first)
	}
}

// waiting is how many wait in a queue.
func waiting(s *sched.Scheduler, queue string) (n int) {
	for _, q := range s.Status().Queues {
		if q.Name != queue {
			continue
		}
		for _, c := range q.Classes {
			for _, k := range c.Waiting {
				n += k
			}
		}
	}
	return n
}

// TestBuildsInOrder has layers of a registry wait: who is online goes first, and whose
// caller goes away leaves nothing behind.
func TestBuildsInOrder(t *testing.T) {
	b := newBuilds(newSched(t, sched.Config{}), 1)
	hold, err := b.enter(as(t, b.sched, "batch"), "r")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := b.enter(ended(as(t, b.sched, "batch")), "r"); err == nil {
		t.Error("a build begins for nobody")
	}
	order := make(chan string, 3)
	build := func(class string) {
		n := waiting(b.sched, "layers r")
		go func() {
			leave, err := b.enter(as(t, b.sched, class), "r")
			if err != nil {
				t.Error(err)
				return
			}
			order <- class
			leave()
		}()
		for waiting(b.sched, "layers r") == n {
			time.Sleep(time.Millisecond)
		}
	}
	build("batch")
	build("batch")
	build("online")
	hold()
	if first := <-order; first != "online" {
		t.Errorf("%s is built first", first)
	}
	<-order
	<-order
}

// stuck returns a node with a scheduler, and a registry that sends nothing of layers but
// their first bytes. One layer of a registry is built at a time; layer is that of stuck:v2.
func stuck(t *testing.T) (g *rig, s *sched.Scheduler, layer digest.Digest) {
	t.Helper()
	g = &rig{reg: registrytest.Start(t, registrytest.Options{}), root: t.TempDir(), log: new(bytes.Buffer)}
	s = newSched(t, sched.Config{})
	g.client = registry.New(registry.Config{Sched: s, Hedge: -1})
	n, err := Open(Config{Root: g.root, Registry: g.client, Sched: s, Layers: 1})
	if err != nil {
		t.Fatal(err)
	}
	g.Node = n
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
		_ = g.client.Close() // never fails
	})
	for i, name := range []string{"stuck:v1", "stuck:v2"} {
		layer = g.push(name, tree{"a": text(byte(i), 100_000)}.gzip(t)).Layers[0].Digest
		g.reg.Fault(layer.String(), 0, registrytest.Stall(100, registrytest.Forever))
	}
	return g, s, layer
}

// begin prepares an image that does not get ready.
func (g *rig) begin(t *testing.T, ctx context.Context, ref string) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan error)
	go func() {
		_, err := g.Prepare(ctx, ref, "")
		done <- err
	}()
	return func() {
		cancel()
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("prepare ends with %v", err)
		}
	}
}

// TestStuckRegistry prepares an image while the layers of another registry never come.
func TestStuckRegistry(t *testing.T) {
	g, s, _ := stuck(t)
	for _, name := range []string{"stuck:v1", "stuck:v2"} {
		defer g.begin(t, as(t, s, "batch"), g.ref(name))()
	}
	for waiting(s, "layers "+g.reg.Host()) == 0 {
		time.Sleep(time.Millisecond)
	}
	other := registrytest.Start(t, registrytest.Options{})
	other.PushImage("library/x", "v1", registrytest.Image{Layers: []registrytest.Layer{
		tree{"a": text(3, 100_000)}.gzip(t), tree{"b": text(4, 100_000)}.gzip(t),
	}})
	if _, err := g.Prepare(as(t, s, "batch"), other.Host()+"/library/x:v1", ""); err != nil {
		t.Error(err)
	}
}

// TestJoinedPrepare has somebody online ask for what is being prepared for batch: all of
// it counts as his from then on, until he goes away, and nothing is fetched twice.
func TestJoinedPrepare(t *testing.T) {
	g, s, layer := stuck(t)
	defer g.begin(t, as(t, s, "batch"), g.ref("stuck:v2"))()
	for g.reg.BlobStats(layer).Requests == 0 {
		time.Sleep(time.Millisecond)
	}
	check := func(class string) {
		t.Helper()
		for _, w := range g.works() {
			for w.Standing().Flow.Class().Name != class {
				time.Sleep(time.Millisecond)
			}
		}
	}
	check("batch")
	leave := g.begin(t, as(t, s, "online"), g.ref("stuck:v2"))
	check("online")
	if n := g.reg.BlobStats(layer).Requests; n != 1 {
		t.Errorf("the layer is asked for %d times", n)
	}
	leave()
	check("batch")
}

// works is that of what is under way: one image, whose only layer is asked for.
func (g *rig) works() (all []*sched.Work) {
	for len(all) != 3 {
		time.Sleep(time.Millisecond)
		all = append(works(&g.prepares), works(&g.indexing)...)
		all = append(all, works(&g.layers)...)
	}
	return all
}

func works[K comparable, V any](f *flights[K, V]) (all []*sched.Work) {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, job := range f.jobs {
		all = append(all, job.work)
	}
	return all
}
