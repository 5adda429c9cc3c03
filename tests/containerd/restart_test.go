package containerd

import (
	"crypto/sha256"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// reader reads the blocks of the large file's last part, again and again, counts
// them, and ends when a read fails.
const reader = `i=0
while dd if=/data/large of=/dev/null bs=4096 count=1 skip=$((1792 + i % 256)) 2>/dev/null; do i=$((i + 1)); echo $i >/progress; done
echo failed >/progress`

// TestRestarts restarts and kills containerd and tatami-host under a container
// that reads, and then has it read what has not been read before.
func TestRestarts(t *testing.T) {
	for _, w := range []way{ways[0], ways[2]} {
		t.Run(w.name, func(t *testing.T) {
			n := newRig(t, w)
			app := n.reg.pushApp(t, "app", 1)
			n.crictl(t, "pull", app.ref)
			pod := n.pod(t, "reader", "")
			id := n.create(t, pod, container{name: "reader", image: app.ref, user: "root", command: []string{"sh", "-c", reader}})
			for i, step := range []struct {
				name string
				do   func(t *testing.T)
			}{
				{"containerd", n.containerdAnew(syscall.SIGTERM)},
				{"containerd killed", n.containerdAnew(syscall.SIGKILL)},
				{"worker killed", n.killWorker},
				{"upgrade", n.upgrade},
				{"tatami-host", n.hostAnew(syscall.SIGTERM)},
				{"tatami-host killed", n.hostAnew(syscall.SIGKILL)},
			} {
				t.Run(step.name, func(t *testing.T) {
					step.do(t)
					n.readsOn(t, id)
					n.readsPart(t, id, i)
				})
			}
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

func (r *rig) containerdAnew(sig syscall.Signal) func(t *testing.T) {
	return func(t *testing.T) {
		r.containerd.end(t, sig)
		r.containerd = r.restartContainerd(t)
	}
}

func (r *rig) hostAnew(sig syscall.Signal) func(t *testing.T) {
	return func(t *testing.T) {
		r.host.end(t, sig)
		r.host = r.restartHost(t)
	}
}

func (r *rig) killWorker(t *testing.T) {
	before := r.workers(t)
	r.run(t, append([]string{"kill", "-KILL"}, before...)...)
	r.workerAfter(t, before)
}

func (r *rig) upgrade(t *testing.T) {
	before := r.workers(t)
	if err := r.host.signal(syscall.SIGHUP); err != nil {
		t.Fatal(err)
	}
	r.workerAfter(t, before)
}

// workers lists the children of tatami-host's supervisor.
func (r *rig) workers(t *testing.T) []string {
	t.Helper()
	supervisor, err := r.host.process()
	if err != nil {
		t.Fatal(err)
	}
	out, _ := r.try(t, "pgrep", "-P", supervisor) // finding none is an error
	return strings.Fields(out)
}

// workerAfter waits until tatami-host has another worker, and only that.
func (r *rig) workerAfter(t *testing.T, before []string) {
	t.Helper()
	until(t, func() error {
		now := r.workers(t)
		if len(now) != 1 || slices.Contains(before, now[0]) {
			return fmt.Errorf("workers %v, before %v", now, before)
		}
		return nil
	})
}

// readsPart has a container read one part of the large file.
func (n *node) readsPart(t *testing.T, id string, i int) {
	t.Helper()
	got := n.exec(t, id, "sh", "-c", fmt.Sprintf("dd if=/data/large bs=%d skip=%d count=1 2>/dev/null | sha256sum", part, i))
	want := fmt.Sprintf("%x  -", sha256.Sum256([]byte(noise(1, largeSize))[i*part:(i+1)*part]))
	if got != want {
		t.Errorf("part %d of the large file: %s, want %s", i, got, want)
	}
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
