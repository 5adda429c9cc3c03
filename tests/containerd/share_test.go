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

// shareNode starts a node whose default snapshotter is ours, in share mode.
func shareNode(t *testing.T, w way, reg *registry) (n *node, containerd, host *daemon) {
	t.Helper()
	need(t, "mount.fuse")
	n = newNode(t, releases[w.rel])
	host = n.host(t, share)
	containerd = n.containerd(t, setup{Pause: reg.pushPause(t), Snapshotter: "tatami",
		Proxies: []proxy{n.proxyOf("tatami")}, Transfer: w.transfer})
	return n, containerd, host
}

// TestShare pulls, runs, reads and removes an image under CRI, lazily.
func TestShare(t *testing.T) {
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			reg := startRegistry(t)
			app := reg.pushApp(t, "app", 1)
			n, _, _ := shareNode(t, w, reg)
			n.crictl(t, "pull", app.ref)
			pod := n.pod(t, "lazy", "")
			id := n.create(t, pod, container{name: "lazy", image: app.ref})
			if got := n.exec(t, id, "cat", "/data/greeting"); got != greeting {
				t.Errorf("the container reads %q, want %q", got, greeting)
			}
			checkLazy(t, n, reg, app)
			if got, want := n.exec(t, id, "sha256sum", "/data/large"), largeSum(1); got != want {
				t.Errorf("large file: %s, want %s", got, want)
			}
			n.removePod(t, pod)
			n.crictl(t, "rmi", app.ref)
			n.criLife(t, app, "")
		})
	}
}

// checkLazy looks at what was fetched of the upper layer: a little of it, and not
// by containerd.
func checkLazy(t *testing.T, n *node, reg *registry, app image) {
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

// TestCtr does the same by ctr. Only that of containerd 2, which has the transfer
// service pull, tells a snapshotter which image it is about.
func TestCtr(t *testing.T) {
	for _, w := range []way{ways[0], ways[2]} {
		t.Run(w.name, func(t *testing.T) {
			reg := startRegistry(t)
			app := reg.pushApp(t, "app", 1)
			n, _, _ := shareNode(t, w, reg)
			n.ctrLife(t, app, "tatami")
			top := app.layers[1]
			if sent := reg.sent(app.repo, top); releases[w.rel].major > 1 && sent > top.size/2 {
				t.Errorf("the registry has sent %d bytes of a layer of %d", sent, top.size)
			}
		})
	}
}

// TestNamedUser has containerd look up a user in the image.
func TestNamedUser(t *testing.T) {
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			reg := startRegistry(t)
			app := reg.pushApp(t, "app", 1)
			n, _, _ := shareNode(t, w, reg)
			n.crictl(t, "pull", app.ref)
			pod := n.pod(t, "user", "")
			for name, c := range map[string]container{
				"of-image": {name: "of-image", image: app.ref},
				"of-pod":   {name: "of-pod", image: app.ref, user: userName},
			} {
				id := n.create(t, pod, c)
				if got, want := n.exec(t, id, "id", "-u"), fmt.Sprint(userID); got != want {
					t.Errorf("%s: the container runs as %s, want %s", name, got, want)
				}
			}
			n.removePod(t, pod)
			if strings.Contains(strings.Join(n.snapshotKeys(t, "k8s.io", "tatami"), " "), "of-") {
				t.Error("snapshots of removed containers are left")
			}
		})
	}
}
