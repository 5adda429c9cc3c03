package mounts

import (
	"testing"

	"github.com/tatami-containers/tatami/host/snapshotter"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// What is mounted for a batch job is read for a pod that is more important as soon as
// that one has it, too, and stays so.
func TestFlow(t *testing.T) {
	g := newRig(t)
	turns, err := sched.New(sched.Config{})
	check(t, err)
	batch, online := turns.Flow("batch", "job"), turns.Flow("online", "pod")
	flow := batch
	g.cfg.Flow = func(snapshotter.Chain) *sched.Flow { return flow }
	whole, _ := g.image(t, "app")
	other, _ := g.image(t, "other")
	read := func(c snapshotter.Chain) (flows []*sched.Flow) {
		g.mu.Lock()
		defer g.mu.Unlock()
		for s := range g.files {
			if s.image == imageOf(c) {
				flows = append(flows, s.Flow())
			}
		}
		return flows
	}
	want := func(c snapshotter.Chain, want *sched.Flow) {
		t.Helper()
		if got := read(c); len(got) != 1 || got[0] != want {
			t.Errorf("read for %d, the first of class %q; want one of %q", len(got), got[0].Class().Name, want.Class().Name)
		}
	}
	_, err = g.Mount(t.Context(), "a.1", whole)
	check(t, err)
	_, err = g.Mount(t.Context(), "a.2", other)
	check(t, err)
	want(whole, batch)
	flow = online
	_, err = g.Mount(t.Context(), "a.3", whole)
	check(t, err)
	want(whole, online)
	want(other, batch)
	flow = batch
	_, err = g.Mount(t.Context(), "a.4", whole)
	check(t, err)
	want(whole, online)
	g.SetFlow(whole, batch)
	want(whole, batch)
	want(other, batch)
	for _, holder := range []string{"a.1", "a.2", "a.3", "a.4"} {
		check(t, g.Release(t.Context(), holder))
	}
	if left := append(read(whole), read(other)...); len(left) > 0 {
		t.Errorf("%d images stay open", len(left))
	}
}
