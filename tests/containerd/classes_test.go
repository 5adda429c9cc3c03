package containerd

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/ttrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
)

// classSettings are those of a node that finds sandboxes and sees pulls, with a
// runtime class of batch jobs.
const classSettings = share + "[cri]\nimage_service = \"" + criSocket + "\"\n[kata]\ndiscover = true\n" +
	"[classes.batch]\nmatch = [\"runtime=jobs\"]\n[classes.mid]\nshare = 30\nfill = \"none\"\nmatch = [\"team.example/tier=middle\"]\n"

// TestClasses has containerd and the kubelet's image service tell of pods: a pull, and
// then the containers, have the class of their pod, and `tatami status` says why.
func TestClasses(t *testing.T) {
	r := &rig{node: newNode(t, releases[0]), reg: startRegistry(t)}
	r.host = r.node.host(t, classSettings)
	r.containerd = r.node.containerd(t, setup{
		Pause: r.reg.pushPause(t), Snapshotter: "tatami", Proxies: []proxy{r.proxyOf("tatami")}, Handlers: []handler{{"jobs", "tatami"}},
	})
	app := r.reg.pushApp(t, "app", 1)
	r.mustKubelet(t, "pull", "--pod-config", r.podIn(t, "pull", "", map[string]string{"koordinator.sh/qosClass": "BE"}), app.ref)
	r.checkOnly(t, "batch")
	for _, tc := range []struct {
		name, handler, cgroup string
		labels                map[string]string
		class, reason         string
	}{
		{name: "plain", class: "online", reason: "default class"},
		{name: "labelled", labels: map[string]string{"koordinator.sh/qosClass": "BE"}, class: "batch", reason: "label koordinator.sh/qosClass=BE"},
		{name: "handler", handler: "jobs", class: "batch", reason: "runtime handler jobs"},
		{name: "middle", handler: "jobs", labels: map[string]string{"team.example/tier": "middle"}, class: "mid", reason: "label team.example/tier=middle"},
		{name: "besteffort", cgroup: "/kubepods/besteffort/podx", class: "batch", reason: "Kubernetes QoS BestEffort"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			config := r.podIn(t, tc.name, tc.cgroup, tc.labels)
			pod := r.crictl(t, "runp", "--runtime", cmp.Or(tc.handler, "runc"), config)
			id := r.crictl(t, "create", "--no-pull", pod, r.writeJSON(t, "container-"+tc.name, map[string]any{
				"metadata": map[string]any{"name": tc.name}, "image": map[string]any{"image": app.ref}, "command": []string{"sleep", "1000000"},
				"linux": map[string]any{}, "log_path": tc.name + ".out",
			}), config)
			r.crictl(t, "start", id) // from now on there is a bundle
			until(t, func() error { return r.mountOf(t, id, tc.class, tc.reason) })
			if tc.name == "labelled" { // the first that reads all of it
				before := r.readFor(t, tc.class)
				r.exec(t, id, "sha256sum", "/data/large")
				if r.readFor(t, tc.class) == before {
					t.Errorf("what the container read is not read for class %s", tc.class)
				}
			}
			r.guest(t, pod, func(ctx context.Context, host api.HostService) {
				d, err := host.Describe(ctx, &api.DescribeRequest{ContainerId: id})
				if err != nil || d.Class != tc.class {
					t.Fatalf("described %v, %v, want class %s", d, err, tc.class)
				}
				for _, b := range r.nodeStatus(t).Sandboxes {
					if b.Id == pod && (len(b.Containers) != 1 || b.Containers[0].Class != tc.class || b.Containers[0].ClassReason != tc.reason) {
						t.Errorf("the status says %v, want %s: %s", b.Containers, tc.class, tc.reason)
					}
				}
			})
			r.removePod(t, pod)
		})
	}
}

// podIn writes a PodSandboxConfig with labels, below a cgroup of the node's.
func (n *node) podIn(t testing.TB, name, cgroup string, labels map[string]string) string {
	t.Helper()
	return n.writeJSON(t, "pod-"+name, map[string]any{
		"labels":        labels,
		"metadata":      map[string]any{"name": name, "uid": name, "namespace": "tests"},
		"log_directory": n.dir,
		"linux": map[string]any{
			"cgroup_parent":    "/" + n.cgroup + cgroup,
			"security_context": map[string]any{"namespace_options": map[string]any{"network": hostNetwork}},
		},
	})
}

// status of the node, as `tatami status -o json` has it.
type status struct {
	Snapshotters []*api.SnapshotterStatus
	Sandboxes    []*api.SandboxStatus
	Schedule     *api.ScheduleStatus
}

func (n *node) nodeStatus(t testing.TB) (s status) {
	t.Helper()
	out := n.run(t, "/opt/tatami/bin/tatami", "status", "-o", "json", "--socket", filepath.Join(n.hostRoot(), "tatami-host.sock"))
	if err := json.Unmarshal([]byte(out), &s); err != nil {
		t.Fatal(err)
	}
	return s
}

// mountOf is an error unless the status says that a container's image, which the node
// has mounted, is read for this class.
func (n *node) mountOf(t testing.TB, id, class, reason string) error {
	t.Helper()
	for _, s := range n.nodeStatus(t).Snapshotters {
		for _, e := range s.Snapshots {
			if strings.HasSuffix(e.Key, "/"+id) && e.Class == class && e.ClassReason == reason {
				return nil
			}
		}
	}
	return fmt.Errorf("no snapshot of container %s has class %s: %s", id, class, reason)
}

// readFor counts the reads of a class.
func (n *node) readFor(t testing.TB, class string) (reads int64) {
	t.Helper()
	for _, c := range n.nodeStatus(t).Schedule.GetClasses() {
		if c.Name == class {
			reads = c.Hits + c.Misses
		}
	}
	return reads
}

// checkOnly wants all that was received so far to be of one class.
func (r *rig) checkOnly(t testing.TB, class string) {
	t.Helper()
	s := r.nodeStatus(t).Schedule
	if !s.GetEnabled() || len(s.Classes) != 3 {
		t.Fatalf("schedule %v", s)
	}
	for _, q := range s.Queues {
		for _, c := range q.Classes {
			if q.Name == "link" && (c.Total > 0) != (c.Class == class) {
				t.Errorf("class %s has received %d bytes", c.Class, c.Total)
			}
		}
	}
}

// guest lets a pod count as a virtual machine of Kata's: it answers as its shim does,
// and asks the node as a guest would. What containerd and the kubelet say of the pod is
// their own.
func (n *node) guest(t testing.TB, pod string, ask func(context.Context, api.HostService)) {
	t.Helper()
	n.run(t, "mkdir", "-p", "/run/kata/"+pod)
	dir, err := os.Open(fmt.Sprintf("/proc/%d/root/run/kata/%s", n.pid, pod))
	if err != nil {
		t.Fatal(err)
	}
	defer dir.Close()
	at := func(name string) string { return fmt.Sprintf("/proc/self/fd/%d/%s", dir.Fd(), name) } // else too long for a socket
	l, err := net.Listen("unix", at("shim-monitor.sock"))
	if err != nil {
		t.Fatal(err)
	}
	shim := &http.Server{ReadHeaderTimeout: patience, Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprintf(w, "hvsock:///run/kata/%s/vm.sock:1024", pod)
	})}
	go func() { _ = shim.Serve(l) }() // ends with Close
	defer shim.Close()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var conn net.Conn
	until(t, func() error {
		conn, err = vsock.Dial(ctx, fmt.Sprintf("unix:%s_%d", at("vm.sock"), vsock.HostPort))
		return err
	})
	client := ttrpc.NewClient(conn)
	defer client.Close()
	ask(ctx, api.NewHostClient(client))

	n.run(t, "rm", "-r", "/run/kata/"+pod)
}
