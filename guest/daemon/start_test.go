package daemon

import (
	"context"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"golang.org/x/sys/unix"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/wireerr"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// expect has the node know a profile of a container's image, and want to know of starts.
func (n *node) expect(id string, profile []*api.Range, budget int64, record time.Duration) {
	n.mu.Lock()
	defer n.mu.Unlock()
	c := n.containers[id]
	c.Profile, c.ProfileBudget, c.RecordUs = profile, budget, record.Microseconds()
}

// readSample reads files of the sample image and compares them.
func readSample(t *testing.T, root string, files ...int) {
	t.Helper()
	for _, i := range files {
		if got, err := readAll(filepath.Join(root, samplePath(i))); err != nil || got != sampleContent(i) {
			t.Fatalf("%s: %d bytes, %v", samplePath(i), len(got), err)
		}
	}
}

func (g *guest) mustUnmount(id string) {
	g.t.Helper()
	if _, err := g.Unmount(g.t.Context(), &api.UnmountRequest{Id: id}); err != nil {
		g.t.Fatal(err)
	}
}

// until waits for something that is certain to happen.
func until(t *testing.T, what string, so func() bool) {
	t.Helper()
	for range 6000 {
		if so() {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatalf("waited in vain for %s", what)
}

// started is the files that a start of the sample image reads, in this order.
var started = []int{17, 3, 20, 8, 11, 2}

// TestAStartIsRecordedAndReplayed: what the first container reads, the second finds
// there: with and without a disk, and however images are mounted.
func TestAStartIsRecordedAndReplayed(t *testing.T) {
	n := newNode(t)
	img := n.pushSample("sample")
	n.add("first", sampleRef, img, "host")
	n.expect("first", nil, 0, time.Minute)
	g := startGuest(t, n)
	readSample(t, g.mustPull("first", sampleRef), started...)
	g.mustUnmount("first")
	recorded := n.recorded()
	if len(recorded) != 1 || recorded[0].ContainerId != "first" || len(recorded[0].Ranges) < len(started) || len(recorded[0].AfterMs) != len(recorded[0].Ranges) {
		t.Fatalf("recorded %v", recorded)
	}
	if !slices.IsSorted(recorded[0].AfterMs) {
		t.Errorf("recorded at %v", recorded[0].AfterMs)
	}
	bytes := int64(0)
	for _, r := range recorded[0].Ranges {
		bytes += r.Length
	}
	for _, tc := range []struct {
		name string
		args []string
	}{
		{"file", []string{"--mount-path", "file"}},
		{"loop", []string{"--mount-path", "loop"}},
		{"disk", []string{"--store-dir", t.TempDir()}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n.add(tc.name, sampleRef, img, "host")
			n.expect(tc.name, recorded[0].Ranges, 32<<20, time.Minute)
			g := startGuest(t, n, append(tc.args, "--store-memory", "64M")...)
			root := g.mustPull(tc.name, sampleRef)
			until(t, "the replay", func() bool { return g.stats().ReplayedBytes >= bytes })
			readSample(t, root, started...)
			g.mustUnmount(tc.name)
			s := g.stats()
			// Chunks that are on their way when their reader comes are no hits.
			if s.Misses > 4 || s.ReplayUsedBytes < bytes*9/10 || s.ReplayUsedBytes+s.ReplayWastedBytes != s.ReplayedBytes {
				t.Errorf("%d misses; of %d bytes %d were fetched, %d used, %d wasted", s.Misses, bytes, s.ReplayedBytes, s.ReplayUsedBytes, s.ReplayWastedBytes)
			}
			if again := n.recorded(); again[len(again)-1].ContainerId != tc.name {
				t.Errorf("the start was not recorded")
			}
		})
	}
}

// TestAReplayIsNotUrgent: the node can tell what somebody waits for from what may be read
// soon.
func TestAReplayIsNotUrgent(t *testing.T) {
	n := newNode(t)
	n.add("c1", sampleRef, n.pushSample("sample"), "host")
	var mu sync.Mutex
	var asked []string // how urgent
	n.reg.FaultFunc(func(r *http.Request) bool {
		if strings.Contains(r.URL.Path, "/segments/") {
			mu.Lock()
			defer mu.Unlock()
			asked = append(asked, r.Header.Get("Priority"))
		}
		return false
	}, 0)
	n.expect("c1", []*api.Range{{Length: 1 << 30}}, 1<<20, time.Minute)
	g := startGuest(t, n)
	root := g.mustPull("c1", sampleRef)
	urgencies := func() []string {
		mu.Lock()
		defer mu.Unlock()
		return slices.Clone(asked)
	}
	until(t, "the replay", func() bool { return g.stats().ReplayedBytes > 1<<19 })
	until(t, "its requests", func() bool { return len(urgencies()) > 0 })
	for _, u := range urgencies() {
		if u != "u=5" {
			t.Errorf("a replay asks with urgency %q", u)
		}
	}
	readSample(t, root, sampleFiles-1) // far behind the budget
	if !slices.Contains(urgencies(), "") {
		t.Errorf("a reader waited for requests of urgency %q", urgencies())
	}
}

// TestAReplayIsBounded: what a node says is more than the guest's memory; nobody reads.
func TestAReplayIsBounded(t *testing.T) {
	n := newNode(t)
	n.add("c1", sampleRef, n.pushSample("sample"), "host")
	n.expect("c1", []*api.Range{{Offset: -5, Length: 3}, {Offset: 0, Length: 1 << 62}, nil, {Offset: 1 << 62, Length: 1 << 62}}, 1<<40, time.Minute)
	g := startGuest(t, n, "--store-memory", "4M")
	root := g.mustPull("c1", sampleRef)
	until(t, "the replay", func() bool { return g.stats().ReplayedBytes > 1<<20 })
	if s := g.stats(); s.ReplayedBytes > 2<<20 {
		t.Errorf("%d bytes were fetched ahead of nobody", s.ReplayedBytes)
	}
	readSample(t, root, started...)
}

// TestNodesThatKnowNoStarts: an older node, and one that has profiles but no call, see
// nothing but what they know, and nothing is complained of.
func TestNodesThatKnowNoStarts(t *testing.T) {
	for _, tc := range []struct {
		name   string
		record time.Duration
		args   []string
		replay bool
	}{
		{name: "older node"},
		{name: "no such call", record: time.Minute, replay: true},
		{name: "switched off", record: time.Minute, args: []string{"--profile", "false"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			n := newNode(t)
			n.add("c1", sampleRef, n.pushSample("sample"), "host")
			profile := []*api.Range{{Length: 1 << 30}}
			if tc.record == 0 {
				profile = nil
			}
			n.expect("c1", profile, 1<<30, tc.record)
			serveOldHost(t, n)
			g := startGuest(t, n, append(tc.args, "--host-address", "unix:"+filepath.Join(n.dir, "old"))...)
			readSample(t, g.mustPull("c1", sampleRef), started...)
			g.mustUnmount("c1")
			if s := g.stats(); tc.replay != (s.ReplayedBytes > 0) {
				t.Errorf("%d bytes were replayed", s.ReplayedBytes)
			}
			if log := g.log.String(); strings.Contains(log, "did not take") || strings.Contains(log, "cannot be fetched ahead") {
				t.Errorf("complaints:\n%s", log)
			}
		})
	}
}

// serveOldHost offers the Host service as it was: Describe and nothing else.
func serveOldHost(t *testing.T, n *node) {
	t.Helper()
	srv, err := ttrpc.NewServer(ttrpc.WithUnaryServerInterceptor(wireerr.Server))
	if err != nil {
		t.Fatal(err)
	}
	srv.RegisterService("tatami.v1.Host", &ttrpc.ServiceDesc{Methods: map[string]ttrpc.Method{
		"Describe": func(ctx context.Context, unmarshal func(any) error) (any, error) {
			var req api.DescribeRequest
			if err := unmarshal(&req); err != nil {
				return nil, err
			}
			return n.Describe(ctx, &req)
		},
	}})
	l := listenOn(t, "unix:"+filepath.Join(n.dir, "old"))
	done := make(chan error, 1)
	go func() { done <- srv.Serve(context.Background(), l) }()
	t.Cleanup(func() {
		_, _ = srv.Close(), <-done // the server was told to end
	})
}

// TestOneImageIsRecordedOnce: a second container of the image reads what the first has
// brought; its recording would say that it needs nothing.
func TestOneImageIsRecordedOnce(t *testing.T) {
	n := newNode(t)
	img := n.pushSample("sample")
	for _, id := range []string{"c1", "c2"} {
		n.add(id, sampleRef, img, "host")
		n.expect(id, nil, 0, time.Minute)
	}
	g := startGuest(t, n)
	for _, id := range []string{"c1", "c2"} {
		readSample(t, g.mustPull(id, sampleRef), started...)
	}
	g.mustUnmount("c2")
	g.mustUnmount("c1")
	if r := n.recorded(); len(r) != 1 || r[0].ContainerId != "c1" {
		t.Errorf("recorded %v", r)
	}
}

// TestWhenItIsReady: what a container reads when it is ready is no part of its start.
func TestWhenItIsReady(t *testing.T) {
	n := newNode(t)
	n.add("c1", sampleRef, n.pushSample("sample"), "host")
	n.expect("c1", nil, 0, time.Minute)
	g := startGuest(t, n)
	root := g.mustPull("c1", sampleRef)
	readSample(t, root, started[0])
	close(n.readiness("c1"))
	until(t, "the recording", func() bool { return len(n.recorded()) == 1 })
	ranges := len(n.recorded()[0].Ranges)
	readSample(t, root, started...)
	g.mustUnmount("c1")
	if r := n.recorded(); len(r) != 1 || ranges == 0 || len(r[0].Ranges) != ranges {
		t.Errorf("recorded %v", r)
	}
}

// TestTheAgentUnmounts: kata-agent tells nobody that a container is gone.
func TestTheAgentUnmounts(t *testing.T) {
	n := newNode(t)
	n.add("c1", sampleRef, n.pushSample("sample"), "host")
	n.expect("c1", nil, 0, time.Minute)
	g := startGuest(t, n)
	root := g.mustPull("c1", sampleRef)
	readSample(t, root, started...)
	if err := unix.Unmount(root, 0); err != nil {
		t.Fatal(err)
	}
	until(t, "the recording", func() bool { return len(n.recorded()) == 1 })
}

// TestADeadWorkerLosesTheRecording and nothing else: it dies while it replays and
// records; the next one serves the same mount.
func TestADeadWorkerLosesTheRecording(t *testing.T) {
	n := newNode(t)
	n.add("c1", sampleRef, n.pushSample("sample"), "host")
	n.expect("c1", []*api.Range{{Length: 1 << 30}}, 1<<30, time.Minute)
	n.reg.Fault("/segments/", 0, registrytest.Delay(20*time.Millisecond), registrytest.Slow(4<<20))
	g := startGuest(t, n)
	root := g.mustPull("c1", sampleRef)
	readSample(t, root, started[0])
	until(t, "the replay", func() bool { return g.stats().ReplayedBytes > 0 })
	reading := make(chan error, 1)
	go func() {
		_, err := os.ReadFile(filepath.Join(root, samplePath(started[1])))
		reading <- err
	}()
	if err := unix.Kill(g.workerPID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-reading; err != nil {
		t.Errorf("a read across the end of the worker: %v", err)
	}
	readSample(t, root, started...)
	g.connect()
	if s := g.stats(); s.Restarts != 1 || s.ReplayedBytes != 0 {
		t.Errorf("restarts %d, %d bytes replayed by the second worker", s.Restarts, s.ReplayedBytes)
	}
	g.mustUnmount("c1")
	if r := n.recorded(); len(r) != 0 {
		t.Errorf("recorded %v", r)
	}
	// An upgrade, which tells the worker to end.
	root = g.mustPull("c1", sampleRef)
	readSample(t, root, started[0])
	old := g.workerPID()
	if err := g.cmd.Process.Signal(unix.SIGHUP); err != nil {
		t.Fatal(err)
	}
	for g.workerPID() == old {
		time.Sleep(time.Millisecond)
	}
	g.connect()
	readSample(t, root, started...)
	g.mustUnmount("c1")
	if r := n.recorded(); len(r) != 0 {
		t.Errorf("recorded after an upgrade: %v", r)
	}
}
