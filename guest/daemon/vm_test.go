package daemon

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tests/vmtest"
)

// TestInAVirtualMachine boots a machine with tatami-guest as its init, runs a
// container from a lazy mount there, kills the worker under it, and powers off.
func TestInAVirtualMachine(t *testing.T) {
	vmtest.Need(t)
	m := vmtest.Boot(t, vmtest.Options{MemoryMiB: 256, Network: true, Cmdline: "tatami.net.address=10.0.2.15/24 tatami.net.gateway=10.0.2.2 tatami.net.dns=10.0.2.3"})
	n := newNodeOn(t, listenOn(t, m.HostAddress(vsock.RelayPort)), listenOn(t, m.HostAddress(vsock.HostPort)))
	n.add("c1", "example.com/box:v1", n.pushBox("box"), "host")

	health, err := m.Guest.Health(t.Context(), &api.HealthRequest{})
	if err != nil || health.Kernel == "" || len(health.Paths) == 0 {
		t.Errorf("health %v, %v", health, err)
	}
	resp, err := m.Guest.Mount(t.Context(), &api.MountRequest{Id: "c1", Target: "/run/c1/rootfs"})
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("kernel %s, mounted as %q, phases %v", health.Kernel, resp.Path, resp.Phases)

	// Without a process namespace the container sees, and kills, the worker.
	script := `
for p in /proc/[0-9]*; do
	tr '\0' '\n' <$p/cmdline | tail -n 1 | grep -qx worker && kill -9 ${p#/proc/} && echo killed
done
md5sum /big
cat /proc/1/comm
exit 4`
	if _, err := m.Runner.Create(t.Context(), &api.CreateRequest{Id: "c1", MountId: "c1", Spec: boxSpec(t, script)}); err != nil {
		t.Fatal(err)
	}
	var streams [3]net.Conn
	for i, s := range []string{"stdin", "stdout", "stderr"} {
		if streams[i], err = vsock.Dial(t.Context(), m.GuestAddress(vsock.StreamPort)); err != nil {
			t.Fatal(err)
		}
		defer streams[i].Close()
		if _, err := fmt.Fprintf(streams[i], "c1 %s\n", s); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := m.Runner.Start(t.Context(), &api.StartRequest{Id: "c1"}); err != nil {
		msg, _ := io.ReadAll(streams[2])
		t.Fatalf("%v: %s", err, msg)
	}
	out, err := io.ReadAll(streams[1])
	const want = "killed\n" + bigSum + "  /big\ninit\n"
	if msg, _ := io.ReadAll(streams[2]); err != nil || string(out) != want {
		t.Errorf("stdout %q, %v, want %q; stderr %q", out, err, want, msg)
	}

	// The connection was to the dead worker.
	again := redial(t, m)
	if w, err := again.Runner.Wait(t.Context(), &api.WaitRequest{Id: "c1"}); err != nil || w.ExitCode != 4 {
		t.Errorf("wait %v, %v", w, err)
	}
	if _, err := again.Runner.Delete(t.Context(), &api.DeleteRequest{Id: "c1"}); err != nil {
		t.Error(err)
	}
	stats, err := again.Guest.Stats(t.Context(), &api.StatsRequest{})
	if err != nil || stats.Restarts != 1 {
		t.Errorf("stats %v, %v", stats, err)
	}
	t.Logf("worker: %d KiB resident", stats.GetResidentBytes()>>10)
	if _, err := again.Runner.PowerOff(t.Context(), &api.PowerOffRequest{}); err != nil {
		t.Error(err)
	}
	<-m.Done()
	if err := m.Err(); err != nil {
		t.Error(err)
	}
	for _, bad := range []string{"panic", "fatal error", "init ends"} {
		if strings.Contains(m.Console(), bad) {
			t.Errorf("the console has %q:\n%s", bad, m.Console())
		}
	}
	if testing.Verbose() {
		t.Log(m.Console())
	}
}

// TestTheNodesFileInAVirtualMachine boots a machine whose init mounts the image
// files of a tatami-virtiofsd, and mounts an image from there.
func TestTheNodesFileInAVirtualMachine(t *testing.T) {
	vmtest.Need(t)
	dir := t.TempDir()
	socket := serveFiles(t, dir)
	m := vmtest.Boot(t, vmtest.Options{MemoryMiB: 256, Args: []string{"-chardev", "socket,id=images,path=" + socket,
		"-device", "vhost-user-fs-pci,chardev=images,tag=tatami"}})
	n := newNodeOn(t, listenOn(t, m.HostAddress(vsock.RelayPort)), listenOn(t, m.HostAddress(vsock.HostPort)))
	img := n.pushBox("box")
	n.add("c1", "example.com/box:v1", img, "host")
	n.show(dir, img)
	resp, err := m.Guest.Mount(t.Context(), &api.MountRequest{Id: "c1", Target: "/run/c1/rootfs"})
	if err != nil || resp.Source != "virtio-fs" {
		t.Fatalf("%v, %v\n%s", resp, err, m.Console())
	}
	t.Logf("mounted as %q, phases %v", resp.Path, resp.Phases)
	if r := n.reg.Requests("/segments/"); len(r) > 0 {
		t.Errorf("asked the relay for %v", r)
	}
	if _, err := m.Guest.Unmount(t.Context(), &api.UnmountRequest{Id: "c1"}); err != nil {
		t.Error(err)
	}
	if _, err := m.Runner.PowerOff(t.Context(), &api.PowerOffRequest{}); err != nil {
		t.Error(err)
	}
	<-m.Done()
	if err := m.Err(); err != nil {
		t.Error(err)
	}
}

// serveFiles runs tatami-virtiofsd for the files of a directory and returns its
// socket.
func serveFiles(t *testing.T, dir string) (socket string) {
	t.Helper()
	base, err := os.MkdirTemp("", "fs-") //nolint:usetesting // a socket is below it: the path must be short
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(base)) })
	socket, bin := filepath.Join(base, "vmm"), filepath.Join(base, "tatami-virtiofsd")
	build := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "github.com/tatami-containers/tatami/virtiofs/cmd/tatami-virtiofsd")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("build tatami-virtiofsd: %v: %s", err, out)
	}
	cmd := exec.CommandContext(context.Background(), bin, "--shared-dir", dir, "--socket-path", socket)
	var log logBuffer
	cmd.Stderr = &log
	cmd.SysProcAttr = &unix.SysProcAttr{Pdeathsig: unix.SIGKILL}
	must(t, cmd.Start())
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it ends with its VMM
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("tatami-virtiofsd: %s", log.String())
		}
	})
	for n := 0; !strings.Contains(log.String(), "Waiting for"); n++ {
		if n > 1000 {
			t.Fatalf("tatami-virtiofsd does not listen: %s", log.String())
		}
		time.Sleep(10 * time.Millisecond)
	}
	return socket
}

// redial connects to the worker that answers now.
func redial(t *testing.T, m *vmtest.Guest) *vmtest.Guest {
	t.Helper()
	client, err := dial(t.Context(), m.GuestAddress(vsock.GuestPort))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = client.Close() }) // the machine may be gone
	return &vmtest.Guest{VM: m.VM, Guest: api.NewGuestClient(client), Runner: api.NewRunnerClient(client)}
}

// bigSum is the MD5 sum of the file /big of the box, as md5sum prints it.
const bigSum = "e230a73093573d16cc4d9a4f7373f4cb"

// pushBox adds an image of busybox with its applets.
func (n *node) pushBox(repo string) registrytest.Pushed {
	n.t.Helper()
	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		n.t.Skip("needs a static busybox: " + err.Error())
	}
	entries := []registrytest.Entry{registrytest.Dir("bin/", 0o755), registrytest.File("bin/busybox", 0o755, string(b)), registrytest.Dir("proc/", 0o755), registrytest.Dir("dev/", 0o755),
		registrytest.File("big", 0o644, strings.Repeat("0123456789abcdef", 1<<18))}
	for _, applet := range []string{"sh", "tr", "tail", "grep", "kill", "md5sum", "cat"} {
		entries = append(entries, registrytest.Symlink("bin/"+applet, "busybox"))
	}
	layers := []registrytest.Layer{gz(entries...)}
	img := n.reg.PushImage(repo, "v1", registrytest.Image{Layers: layers})
	n.pushIndex(repo, img, layers)
	return img
}

func boxSpec(t *testing.T, script string) []byte {
	t.Helper()
	kill := []string{"CAP_KILL", "CAP_SYS_PTRACE"}
	b, err := json.Marshal(&specs.Spec{
		Version: "1.0.2", Root: &specs.Root{Path: "rootfs"},
		Process: &specs.Process{Args: []string{"/bin/sh", "-c", script}, Cwd: "/", Env: []string{"PATH=/bin"},
			Capabilities: &specs.LinuxCapabilities{Bounding: kill, Effective: kill, Permitted: kill}},
		Mounts: []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return b
}
