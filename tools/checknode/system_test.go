package checknode

import (
	"context"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// listen opens a unix socket.
func listen(t *testing.T, name string) (net.Listener, string) {
	t.Helper()
	p := filepath.Join(t.TempDir(), name)
	l, err := net.Listen("unix", p)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l, p
}

// serve runs a gRPC server that answers what it does not know by unknown.
func serve(t *testing.T, unknown grpc.StreamHandler) string {
	l, p := listen(t, "s")
	s := grpc.NewServer(grpc.UnknownServiceHandler(unknown))
	if unknown == nil {
		s = grpc.NewServer()
	}
	go func() { _ = s.Serve(l) }() // ends with Stop
	t.Cleanup(s.Stop)
	return p
}

func TestSnapshotterAnswers(t *testing.T) {
	asked := ""
	answers := serve(t, func(_ any, s grpc.ServerStream) error {
		asked, _ = grpc.MethodFromServerStream(s)
		return status.Error(codes.NotFound, "snapshot does not exist")
	})
	if err := (running{}).snapshotter(t.Context(), answers); err != nil {
		t.Error(err)
	}
	if asked != "/containerd.services.snapshots.v1.Snapshots/Stat" {
		t.Errorf("asked for %q", asked)
	}
	l, web := listen(t, "web")
	go func() { _ = http.Serve(l, http.NotFoundHandler()) }()
	dead, gone := listen(t, "dead")
	dead.Close()
	for name, c := range map[string]struct{ socket, want string }{
		"another service": {serve(t, nil), "no snapshotter is served"},
		"no gRPC":         {web, "http"},
		"no server":       {gone, "connect"},
		"a name too long": {"/" + strings.Repeat("x", 200), "invalid argument"},
	} {
		if err := (running{}).snapshotter(t.Context(), c.socket); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := (running{}).control(t.Context(), web); err == nil {
		t.Error("a web server is taken for tatami-host")
	}
}

// A socket that never answers does not hold up the check.
func TestSilentSocket(t *testing.T) {
	_, p := listen(t, "silent")
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	if (running{}).snapshotter(ctx, p) == nil || (running{}).control(ctx, p) == nil {
		t.Error("silence is taken for an answer")
	}
}

// The running node: real tatami-host on its control socket, a snapshotter that
// answers and one that does not.
func TestRunning(t *testing.T) {
	root := t.TempDir()
	control := startHost(t, root)
	good := serve(t, func(any, grpc.ServerStream) error { return status.Error(codes.NotFound, "") })
	f := installed(t)
	state := t.TempDir() // no other tatami-host serves here
	for _, file := range []string{"etc/tatami/host.toml", ctrdFile} {
		f[file] = strings.ReplaceAll(f[file], "/run/tatami-host", state)
	}
	sub(t, f, "etc/tatami/host.toml", `root = "/var/lib/tatami"`, `root = "`+root+`"`)
	sub(t, f, "etc/tatami/host.toml", "mode = \"guest\"", "mode = \"guest\"\nsocket = \""+good+"\"")
	sub(t, f, ctrdFile, state+"/tatami.sock", good)
	files, err := openTree(f.write(t))
	if err != nil {
		t.Fatal(err)
	}
	n := node{files: files, system: running{}, opts: Options{Containerd: ContainerdFile, Host: HostFile, Version: "2.4.2"}}
	var what []string
	for _, f := range n.check(t.Context()).Findings {
		what = append(what, f.What)
	}
	if len(what) != 2 || !strings.Contains(what[0], state+"/tatami-block.sock") || !strings.Contains(what[1], state+"/tatami-share.sock") {
		t.Errorf("%s answers, as does %s; found %q", control, good, what)
	}
	sub(t, f, "etc/tatami/host.toml", `root = "`+root, `root = "`+root+`/other`)
	if n.files, err = openTree(f.write(t)); err != nil {
		t.Fatal(err)
	}
	if r := n.check(t.Context()); r.Works || !strings.Contains(r.Findings[0].What, "tatami-host does not answer") {
		t.Errorf("%+v", r.Findings)
	}
}

// startHost builds and starts tatami-host, and returns its control socket.
func startHost(t *testing.T, root string) string {
	t.Helper()
	bin := filepath.Join(t.TempDir(), "tatami-host")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", bin, "../../host/cmd/tatami-host").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	cmd := exec.Command(bin, "--root", root)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Signal(os.Interrupt)
		if err := cmd.Wait(); err != nil {
			t.Errorf("tatami-host: %v", err)
		}
	})
	socket := filepath.Join(root, "tatami-host.sock")
	for end := time.Now().Add(30 * time.Second); time.Now().Before(end); time.Sleep(20 * time.Millisecond) {
		if (running{}).control(t.Context(), socket) == nil {
			return socket
		}
	}
	t.Fatal("tatami-host does not answer")
	return ""
}

// Without containerd's version, an old one is assumed, and the report says so.
func TestUnknownVersion(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	files, err := openTree(installed(t).write(t))
	if err != nil {
		t.Fatal(err)
	}
	n := node{files: files, system: running{}, opts: Options{Containerd: ContainerdFile, Host: HostFile}}
	r := n.check(t.Context())
	if f := r.Findings[0]; f.Severity != Warning || !strings.Contains(f.What, "not in the search path") || !r.Containerd.Assumed {
		t.Errorf("%+v, %+v", r.Containerd, f)
	}
}
