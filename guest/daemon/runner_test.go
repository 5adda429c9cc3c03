package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// pushBusybox adds an image that can run a shell.
func (n *node) pushBusybox(repo string) registrytest.Pushed {
	n.t.Helper()
	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		n.t.Skip("needs a static busybox: " + err.Error())
	}
	layers := []registrytest.Layer{gz(
		registrytest.Dir("bin/", 0o755), registrytest.File("bin/sh", 0o755, string(b)), registrytest.Dir("proc/", 0o755), registrytest.Dir("dev/", 0o755),
		registrytest.Dir("etc/", 0o755), registrytest.File("etc/passwd", 0o644, "app:x:12:34::/:\n"), registrytest.File("big", 0o644, strings.Repeat("0123456789abcdef", 1<<17)),
	)}
	img := n.reg.PushImage(repo, "v1", registrytest.Image{Layers: layers})
	n.pushIndex(repo, img, layers)
	return img
}

// startContainer mounts busybox for a container and starts a script in it.
func (g *guest) startContainer(n *node, id, script string) (streams [3]net.Conn) {
	g.t.Helper()
	n.add(id, "example.com/busybox:v1", n.pushBusybox("busybox"), "host")
	g.mustPull(id, "example.com/busybox:v1")
	if _, err := g.Create(g.t.Context(), &api.CreateRequest{Id: id, MountId: id, Spec: shellSpec(g.t, script)}); err != nil {
		g.t.Fatal(err)
	}
	for i, s := range []string{"stdin", "stdout", "stderr"} {
		c, err := vsock.Dial(g.t.Context(), "unix:"+g.path("streams"))
		if err != nil {
			g.t.Fatal(err)
		}
		g.t.Cleanup(func() { _ = c.Close() })
		if _, err := fmt.Fprintf(c, "%s %s\n", id, s); err != nil {
			g.t.Fatal(err)
		}
		streams[i] = c
	}
	if _, err := g.Start(g.t.Context(), &api.StartRequest{Id: id}); err != nil {
		g.t.Fatal(err)
	}
	return streams
}

func shellSpec(t *testing.T, script string) []byte {
	t.Helper()
	b, err := json.Marshal(&specs.Spec{
		Version: "1.0.2", Root: &specs.Root{Path: "rootfs"}, Annotations: map[string]string{"dev.tatami.image.user": "app"},
		Process: &specs.Process{Args: []string{"/bin/sh", "-c", script}, Cwd: "/", Env: []string{"PATH=/bin"}},
		Mounts:  []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestAContainerOutlivesTheWorker runs a container on a lazy mount, kills the
// worker below it, and gets all of its output and its exit code.
func TestAContainerOutlivesTheWorker(t *testing.T) {
	g, n := startRunner(t)
	if _, err := g.Create(t.Context(), &api.CreateRequest{Id: "x", MountId: "nothing", Spec: shellSpec(t, "")}); !errdefs.IsNotFound(errgrpc.ToNative(err)) {
		t.Errorf("create on a mount that is not there: %v", err)
	}
	streams := g.startContainer(n, "c1", "id -u; read x; cat /big; exit 6")
	id := make([]byte, 3)
	if _, err := io.ReadFull(streams[1], id); err != nil || string(id) != "12\n" {
		t.Fatalf("%q, %v", id, err)
	}
	dropCaches(t)
	if err := unix.Kill(g.workerPID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(streams[0], "go\n"); err != nil {
		t.Fatal(err)
	}
	out, err := io.ReadAll(streams[1])
	if err != nil || string(out) != strings.Repeat("0123456789abcdef", 1<<17) {
		t.Errorf("%d bytes, %v", len(out), err)
	}
	g.connect()
	w, err := g.Wait(t.Context(), &api.WaitRequest{Id: "c1"})
	if err != nil || w.ExitCode != 6 {
		t.Errorf("wait %v, %v", w, err)
	}
	if _, err := g.Delete(t.Context(), &api.DeleteRequest{Id: "c1"}); err != nil {
		t.Error(err)
	}
}

// TestPowerOffEndsWhatRuns: the answer comes, the container is gone, and the
// harness sees that nothing stays mounted.
func TestPowerOffEndsWhatRuns(t *testing.T) {
	g, n := startRunner(t)
	streams := g.startContainer(n, "c1", "echo up; read forever")
	if _, err := io.ReadFull(streams[1], make([]byte, 3)); err != nil {
		t.Fatal(err)
	}
	if _, err := g.PowerOff(t.Context(), &api.PowerOffRequest{}); err != nil {
		t.Error(err)
	}
	if rest, err := io.ReadAll(streams[1]); err != nil && !errors.Is(err, unix.ECONNRESET) || len(rest) > 0 {
		t.Errorf("%q, %v", rest, err)
	}
}

func startRunner(t *testing.T) (*guest, *node) {
	t.Helper()
	if _, err := exec.LookPath("runc"); err != nil {
		t.Skip("needs runc: " + err.Error())
	}
	n := newNode(t)
	return startGuest(t, n, "--runner", "true"), n
}
