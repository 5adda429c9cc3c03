package containerd

import (
	"fmt"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// reader reads another block of the large file every few milliseconds, counts
// the blocks, and ends when a read fails.
const reader = `i=0
while dd if=/data/large of=/dev/null bs=4096 count=1 skip=$((i % 2048)) 2>/dev/null; do i=$((i + 1)); echo $i >/progress; done
echo failed >/progress`

// TestRestarts restarts and kills containerd and tatami-host under a container
// that reads what has not been read before.
func TestRestarts(t *testing.T) {
	for _, w := range []way{ways[0], ways[2]} {
		t.Run(w.name, func(t *testing.T) {
			n := newRig(t, w)
			app := n.reg.pushApp(t, "app", 1)
			n.crictl(t, "pull", app.ref)
			pod := n.pod(t, "reader", "")
			id := n.create(t, pod, container{name: "reader", image: app.ref, user: "root", command: []string{"sh", "-c", reader}})
			step := func(name string, do func(t *testing.T)) {
				t.Run(name, func(t *testing.T) {
					do(t)
					n.readsOn(t, id)
				})
			}
			step("containerd", func(t *testing.T) {
				n.containerd.end(t, syscall.SIGTERM)
				n.containerd = n.restartContainerd(t)
			})
			step("containerd killed", func(t *testing.T) {
				n.containerd.end(t, syscall.SIGKILL)
				n.containerd = n.restartContainerd(t)
			})
			step("worker killed", func(t *testing.T) { n.run(t, "pkill", "-KILL", "-P", n.hostProcess(t, n.host)) })
			step("upgrade", func(t *testing.T) {
				if err := n.host.signal(syscall.SIGHUP); err != nil {
					t.Fatal(err)
				}
			})
			step("tatami-host", func(t *testing.T) {
				n.host.end(t, syscall.SIGTERM)
				n.host = n.restartHost(t)
			})
			step("tatami-host killed", func(t *testing.T) {
				n.host.end(t, syscall.SIGKILL)
				n.host = n.restartHost(t)
			})
			if got, want := n.exec(t, id, "sha256sum", "/data/large"), largeSum(1); got != want {
				t.Errorf("large file: %s, want %s", got, want)
			}
			// What came through the restarts works as before, and can go.
			n.removePod(t, pod)
			n.crictl(t, "rmi", app.ref)
			n.criLife(t, app, "")
		})
	}
}

func (n *node) hostProcess(t *testing.T, host *daemon) string {
	t.Helper()
	pid, err := host.process()
	if err != nil {
		t.Fatal(err)
	}
	return pid
}

// readsOn waits until the container has read more than at the call.
func (n *node) readsOn(t *testing.T, id string) {
	t.Helper()
	before := n.progress(t, id)
	until(t, func() error {
		if now := n.progress(t, id); now <= before {
			return fmt.Errorf("%d blocks are read, as before", now)
		}
		return nil
	})
}

// progress is how many blocks the container has read.
func (n *node) progress(t *testing.T, id string) int {
	t.Helper()
	for deadline := time.Now().Add(patience); ; time.Sleep(20 * time.Millisecond) {
		said := strings.TrimSpace(n.exec(t, id, "cat", "/progress"))
		count, err := strconv.Atoi(said)
		if err == nil {
			return count
		}
		// Empty while it is being written.
		if said != "" || time.Now().After(deadline) {
			t.Fatalf("the container's reads: %q", said)
		}
	}
}
