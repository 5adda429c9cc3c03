package relay

import (
	"context"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// Whose work a request is, the host knows; a guest can only say that it is less urgent.
func TestWorkOfRequest(t *testing.T) {
	turns, err := sched.New(sched.Config{})
	if err != nil {
		t.Fatal(err)
	}
	img := &stock{objects: map[string][]byte{}, asked: make(chan context.Context, 1)}
	d := img.put(segments, []byte("plain bytes"))
	flow := turns.Flow("batch", "box")
	g := start(t, Config{Queue: turns.Relay(), Grants: func() []Grant {
		return []Grant{{Domain: "docker.io", Repository: "a", Manifest: d, Image: img, Flow: flow}}
	}})
	for priority, want := range map[string]sched.Rank{
		"": sched.Demand, "u=0": sched.Demand, "u=3, i": sched.Demand, "u=5": sched.Prefetch, "u=7": sched.Background, "u=online": sched.Demand,
	} {
		header := []string{"Priority", priority}
		if priority == "" {
			header = nil
		}
		resp, body, err := g.do(t, "GET", "/v2/a/segments/"+d.String(), header...)
		if err != nil || resp.StatusCode != 200 || string(body) != "plain bytes" {
			t.Fatalf("%q: %v %q %v", priority, resp, body, err)
		}
		ctx := <-img.asked
		if got := sched.From(ctx).Standing(); got != (sched.Standing{Flow: flow, Rank: want}) || sched.RankOf(ctx) != want {
			t.Errorf("%q: %s of class %q, and rank %s", priority, got.Rank, got.Flow.Class().Name, sched.RankOf(ctx))
		}
	}
	for _, q := range turns.Status().Queues {
		if q.Name == "relay" && (len(q.Classes) != 2 || q.Classes[0].Total != 0 || q.Classes[1].Total <= 0) {
			t.Errorf("what was sent was charged so: %+v", q.Classes)
		}
	}
}
