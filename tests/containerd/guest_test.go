package containerd

import (
	"fmt"
	"strings"
	"testing"
)

// TestMountHelper runs an image of a snapshotter in guest mode under runc.
// containerd mounts it by mount.fuse(8), which runs our helper: to look up a
// user, and here, where no virtual machine does it, for the container too.
func TestMountHelper(t *testing.T) {
	need(t, "mount.fuse")
	for _, w := range []way{ways[0], ways[2]} {
		t.Run(w.name, func(t *testing.T) {
			reg := startRegistry(t)
			app := reg.pushApp(t, "app", 1)
			n := newNode(t, releases[w.rel])
			n.host(t, guest)
			n.containerd(t, setup{Pause: reg.pushPause(t), Snapshotter: "guest", Proxies: []proxy{n.proxyOf("guest")}})
			n.crictl(t, "pull", app.ref)
			if n.rel.major > 1 { // `ctr run` of 1.6 cannot name a user
				got := n.ctr(t, "--namespace", "k8s.io", "run", "--rm", "--snapshotter", "guest", "--user", userName,
					"--cgroup", "/"+n.cgroup+"/ctr", app.ref, "user", "/bin/id", "-u")
				if want := fmt.Sprint(userID); strings.TrimSpace(got) != want {
					t.Errorf("the container runs as %q, want %s", got, want)
				}
			}
			pod := n.pod(t, "guest", "")
			id := n.create(t, pod, container{name: "guest", image: app.ref, user: userName})
			if got, want := n.exec(t, id, "id", "-u"), fmt.Sprint(userID); got != want {
				t.Errorf("the container runs as %s, want %s", got, want)
			}
			n.checkLazy(t, reg, app)
			n.removePod(t, pod)
		})
	}
}
