package containerd

import (
	"crypto/sha256"
	"fmt"
	"strings"
	"testing"
)

// way is a containerd and the way by which its CRI pulls.
type way struct {
	name     string
	rel      int // of releases
	transfer bool
}

var ways = []way{{"2.4", 0, false}, {"2.4-transfer", 0, true}, {"1.6", 1, false}}

// rig is a node whose default snapshotter is ours in share mode, with a registry.
type rig struct {
	*node
	reg              *registry
	containerd, host *daemon
}

func newRig(t testing.TB, w way) *rig {
	t.Helper()
	need(t, "mount.fuse")
	r := &rig{node: newNode(t, releases[w.rel]), reg: startRegistry(t)}
	r.host = r.node.host(t, share)
	r.containerd = r.node.containerd(t, setup{Pause: r.reg.pushPause(t), Snapshotter: "tatami",
		Proxies: []proxy{r.proxyOf("tatami")}, Transfer: w.transfer})
	return r
}

// TestShare uses images in every way that needs nothing but one node.
func TestShare(t *testing.T) {
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			r := newRig(t, w)
			t.Run("crictl", r.testCrictl)
			t.Run("pulls", r.testPulls)
			t.Run("fallback", r.testFallback)
			t.Run("registry fails", r.testRegistryFails)
			if w.transfer {
				return // the rest does not depend on it
			}
			t.Run("ctr", r.testCtr)
			t.Run("user", r.testUser)
			t.Run("removal", r.testRemoval)
		})
	}
}

// testCrictl pulls, runs, reads and removes an image under CRI, lazily, and then
// again.
func (r *rig) testCrictl(t *testing.T) {
	app := r.reg.pushApp(t, "app", 1)
	r.crictl(t, "pull", app.ref)
	pod := r.pod(t, "lazy", "")
	id := r.create(t, pod, container{name: "lazy", image: app.ref})
	if got := r.exec(t, id, "cat", "/data/greeting"); got != greeting {
		t.Errorf("the container reads %q, want %q", got, greeting)
	}
	r.checkLazy(t, r.reg, app)
	if got, want := r.exec(t, id, "sha256sum", "/data/large"), largeSum(1); got != want {
		t.Errorf("large file: %s, want %s", got, want)
	}
	r.removePod(t, pod)
	r.crictl(t, "rmi", app.ref)
	r.criLife(t, app, "")
}

// checkLazy looks at what was fetched of the upper layer: a little of it, and not
// by containerd.
func (n *node) checkLazy(t testing.TB, reg *registry, app image) {
	t.Helper()
	top := app.layers[len(app.layers)-1]
	if sent := reg.sent(app.repo, top); sent == 0 || sent > top.size/2 {
		t.Errorf("the registry has sent %d bytes of a layer of %d", sent, top.size)
	}
	if n.hasContent(t, "k8s.io", top) {
		t.Errorf("containerd has fetched layer %s", top.digest)
	}
}

// largeSum is what sha256sum says of the application's large file.
func largeSum(seed uint64) string {
	return fmt.Sprintf("%x  /data/large", sha256.Sum256([]byte(noise(seed, largeSize))))
}

// testCtr does the same by ctr. Only that of containerd 2, which has the transfer
// service pull, tells a snapshotter which image it is about.
func (r *rig) testCtr(t *testing.T) {
	app := r.reg.pushApp(t, "ctr", 2)
	r.ctrLife(t, app, "tatami")
	top := app.layers[1]
	sent := r.reg.sent(app.repo, top)
	if lazy := sent < top.size/2; lazy != (r.rel.major > 1) {
		t.Errorf("the registry has sent %d bytes of a layer of %d", sent, top.size)
	}
}

// testUser has containerd look up users in the image.
func (r *rig) testUser(t *testing.T) {
	app := r.reg.pushApp(t, "user", 3)
	r.crictl(t, "pull", app.ref)
	pod := r.pod(t, "user", "")
	for _, c := range []container{
		{name: "of-image", image: app.ref}, // the image's config names the user
		{name: "of-pod", image: app.ref, user: userName},
	} {
		id := r.create(t, pod, c)
		if got, want := r.exec(t, id, "id", "-u"), fmt.Sprint(userID); got != want {
			t.Errorf("%s: the container runs as %s, want %s", c.name, got, want)
		}
	}
	r.checkLazy(t, r.reg, app)
	r.removePod(t, pod)
	r.crictl(t, "rmi", app.ref)
	until(t, func() error { return r.onlyPause(t, "tatami") })
}

// onlyPause is an error when a snapshotter has more under CRI than the one layer
// of the sandbox's image.
func (n *node) onlyPause(t testing.TB, snapshotter string) error {
	t.Helper()
	if keys := n.snapshotKeys(t, "k8s.io", snapshotter); len(keys) != 1 {
		return fmt.Errorf("%s has snapshots %s, want one", snapshotter, strings.Join(keys, " "))
	}
	return nil
}
