package containerd

import (
	"strings"
	"testing"
)

// TestOverlayfs does what the other tests do, without us: what fails here is not
// the snapshotter's.
func TestOverlayfs(t *testing.T) {
	for _, rel := range releases {
		t.Run(rel.name, func(t *testing.T) {
			t.Parallel()
			reg := startRegistry(t)
			app := reg.pushApp(t, "app", 1)
			n := newNode(t, rel)
			n.containerd(t, setup{Pause: reg.pushPause(t), Snapshotter: "overlayfs"})
			n.criLife(t, app, "")
			n.ctrLife(t, app, "overlayfs")
		})
	}
}

// criLife pulls an image by crictl, runs it, reads it, and removes everything.
func (n *node) criLife(t *testing.T, app image, handler string) {
	t.Helper()
	n.crictl(t, "pull", app.ref)
	pod := n.pod(t, "life", handler)
	id := n.create(t, pod, container{name: "life", image: app.ref})
	if got := n.exec(t, id, "cat", "/data/greeting"); got != greeting {
		t.Errorf("the container reads %q, want %q", got, greeting)
	}
	n.crictl(t, "stop", "--timeout", "0", id)
	n.crictl(t, "rm", id)
	n.removePod(t, pod)
	n.crictl(t, "rmi", app.ref)
	for _, tag := range n.images(t) {
		if tag == app.ref {
			t.Errorf("%s is there after its removal", app.ref)
		}
	}
}

// ctrLife pulls an image by ctr, runs it, reads it, and removes everything.
func (n *node) ctrLife(t *testing.T, app image, snapshotter string) {
	t.Helper()
	n.ctr(t, "image", "pull", "--plain-http", "--snapshotter", snapshotter, app.ref)
	got := n.ctr(t, "run", "--rm", "--snapshotter", snapshotter, "--cgroup", "/"+n.cgroup+"/ctr",
		app.ref, "ctr", "/bin/cat", "/data/greeting")
	if strings.TrimSpace(got) != greeting {
		t.Errorf("the container reads %q, want %q", got, greeting)
	}
	n.ctr(t, "image", "rm", "--sync", app.ref)
	if left := n.ctr(t, "snapshot", "--snapshotter", snapshotter, "ls"); len(strings.Split(strings.TrimSpace(left), "\n")) > 1 {
		t.Errorf("snapshots are left:\n%s", left)
	}
}
