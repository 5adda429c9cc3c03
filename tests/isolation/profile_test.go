package isolation

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// boot stands in for the start of a virtual machine, between the pull and the mount.
const boot = 2 * time.Second

// started is what a start took, in seconds, and what it had to wait for.
type started struct {
	ready, mounted float64 // since the pull, since the mount
	node, guest    int64   // reads that had to wait
}

// profile is what a start of an image is like on a node that has nothing, on one that has
// found the profile of another node's start in the registry, and where the image is.
func (l *lab) profile(tb testing.TB) {
	app := ofSize("app", 128<<20, 256<<10)
	l.push("online", app.layers(tb, "app", lazy)...)
	names := some(app.names(), 8)
	l.limit(true)
	var cold, replayed, there started
	within(tb, func(tb testing.TB) {
		n := newNode(tb, protected, l.site, noFill)
		var b *sandbox
		cold, b = n.measure(tb, l.ref("online"), names)
		b.publish(tb, l.ref("online"))
	})
	within(tb, func(tb testing.TB) {
		n := newNode(tb, protected, l.site, noFill)
		replayed, _ = n.measure(tb, l.ref("online"), names)
		there, _ = n.measure(tb, l.ref("online"), names)
	})
	l.addProfile(app, names, there, cold, replayed)
}

func (l *lab) addProfile(app content, names []string, there, cold, replayed started) {
	l.section("Start-up profiles", fmt.Sprintf("A start reads %d files (%s) of an image of %s, in no order; a virtual machine takes %v to boot between pull and mount (nobody waits here, it is a pause). The profile comes from another node, by the registry.",
		len(names), megabytes(int64(len(names)*app.size)), megabytes(app.total()), boot),
		"image on the node", "nothing on the node", "profile replayed")
	near := aim{"≤ 1.2× image on the node", func(v values) bool { return v[2] <= 1.2*v[0] }}
	l.add(row{"ready, since the pull", "s", values{there.ready, cold.ready, replayed.ready}, near},
		row{"ready, since the mount", "s", values{there.mounted, cold.mounted, replayed.mounted}, near},
		row{"reads that wait for the registry", "", values{float64(there.node), float64(cold.node), float64(replayed.node)},
			aim{"≤ 0.1× nothing on the node", func(v values) bool { return v[2] <= 0.1*v[1] }}},
		row{"reads that wait in the guest", "", values{float64(there.guest), float64(cold.guest), float64(replayed.guest)}, aim{}})
}

// some are every nth of names, in an order of their own that is always the same.
func some(names []string, nth int) (out []string) {
	for i := 0; i < len(names); i += nth {
		out = append(out, names[i])
	}
	rand.New(rand.NewPCG(7, 7)).Shuffle(len(out), func(a, b int) { out[a], out[b] = out[b], out[a] })
	return out
}

// measure starts a sandbox as a pod starts: the pull, the boot, the mount, and what its
// container reads first.
func (n *node) measure(tb testing.TB, image string, names []string) (s started, b *sandbox) {
	tb.Helper()
	b = n.newSandbox(tb, "online")
	before := n.misses(tb)
	pulled := time.Now()
	check(tb, n.prepare(tb.Context(), image, "online"))
	time.Sleep(boot)
	mounted := time.Now()
	check(tb, b.mount(tb.Context(), image))
	ended := time.Unix(0, b.mustRead(tb, names).Ended)
	s.ready, s.mounted = ended.Sub(pulled).Seconds(), ended.Sub(mounted).Seconds()
	s.node = n.misses(tb) - before
	stats, err := b.guest.Stats(tb.Context(), &api.StatsRequest{})
	check(tb, errgrpc.ToNative(err))
	s.guest = stats.Misses
	return s, b
}

// misses is how many reads of the node's store have had to wait for a registry.
func (n *node) misses(tb testing.TB) int64 {
	tb.Helper()
	s, err := n.api.NodeStats(tb.Context(), &api.NodeStatsRequest{})
	check(tb, errgrpc.ToNative(err))
	return s.Store.Misses
}

// publish ends the recording of the sandbox's start, and has its node push the profile.
func (b *sandbox) publish(tb testing.TB, image string) {
	tb.Helper()
	ctx, cancel := context.WithTimeout(tb.Context(), patience)
	defer cancel()
	_, err := b.node.api.EndRecording(ctx, &api.EndRecordingRequest{ContainerId: b.id})
	check(tb, errgrpc.ToNative(err))
	_, err = b.node.api.PushProfile(ctx, &api.PushProfileRequest{Image: image})
	check(tb, errgrpc.ToNative(err))
}
