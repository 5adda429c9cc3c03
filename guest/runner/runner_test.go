package runner

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
)

// machine is a runner with a stream port and a root file system.
type machine struct {
	*Runner
	t      *testing.T
	root   string
	socket string
}

func newMachine(t *testing.T) *machine {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: runs containers")
	}
	if _, err := exec.LookPath("runc"); err != nil {
		t.Skip("needs runc: " + err.Error())
	}
	dir := t.TempDir()
	m := &machine{t: t, root: filepath.Join(dir, "root"), socket: filepath.Join(dir, "s")}
	m.makeRoot()
	r, err := New(Config{Dir: filepath.Join(dir, "runner")})
	if err != nil {
		t.Fatal(err)
	}
	m.Runner = r
	l, err := vsock.Listen("unix:" + m.socket)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	served := make(chan error, 1)
	go func() { served <- r.ServeStreams(ctx, l) }()
	t.Cleanup(func() {
		if err := r.Close(context.Background()); err != nil {
			t.Error(err)
		}
		cancel()
		if err := <-served; err != nil {
			t.Error(err)
		}
	})
	return m
}

func (m *machine) makeRoot() {
	m.t.Helper()
	for _, d := range []string{"bin", "proc", "dev", "tmp"} {
		if err := os.MkdirAll(filepath.Join(m.root, d), 0o755); err != nil {
			m.t.Fatal(err)
		}
	}
	b, err := os.ReadFile("/bin/busybox")
	if err != nil {
		m.t.Skip("needs a static busybox: " + err.Error())
	}
	if err := os.WriteFile(filepath.Join(m.root, "bin/sh"), b, 0o755); err != nil {
		m.t.Fatal(err)
	}
}

func (m *machine) spec(args ...string) []byte {
	m.t.Helper()
	b, err := json.Marshal(&specs.Spec{
		Version: "1.0.2",
		Root:    &specs.Root{Path: m.root},
		Process: &specs.Process{Args: args, Cwd: "/", Env: []string{"PATH=/bin"}},
		Mounts:  []specs.Mount{{Destination: "/proc", Type: "proc", Source: "proc"}},
		Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.MountNamespace}, {Type: specs.IPCNamespace}, {Type: specs.UTSNamespace}}},
	})
	if err != nil {
		m.t.Fatal(err)
	}
	return b
}

// create makes a container that runs script, with its streams connected.
func (m *machine) create(id, script string) [streamCount]*net.UnixConn {
	m.t.Helper()
	if _, err := m.Create(m.t.Context(), &api.CreateRequest{Id: id, Spec: m.spec("/bin/sh", "-c", script)}); err != nil {
		m.t.Fatal(err)
	}
	return m.connect(id)
}

func (m *machine) connect(id string) (conns [streamCount]*net.UnixConn) {
	m.t.Helper()
	for s := range streamCount {
		conns[s] = m.dial(fmt.Sprintf("%s %v\n", id, s))
	}
	return conns
}

func (m *machine) dial(hello string) *net.UnixConn {
	m.t.Helper()
	c, err := vsock.Dial(m.t.Context(), "unix:"+m.socket)
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { _ = c.Close() })
	if _, err := io.WriteString(c, hello); err != nil {
		m.t.Fatal(err)
	}
	return c.(*net.UnixConn)
}

func (m *machine) start(id string) {
	m.t.Helper()
	r, err := m.Start(m.t.Context(), &api.StartRequest{Id: id})
	if err != nil {
		m.t.Fatal(err)
	}
	if r.Pid <= 1 {
		m.t.Errorf("pid %d", r.Pid)
	}
}

func (m *machine) wait(id string) int32 {
	m.t.Helper()
	r, err := m.Wait(m.t.Context(), &api.WaitRequest{Id: id})
	if err != nil {
		m.t.Fatal(err)
	}
	return r.ExitCode
}

func (m *machine) delete(id string) {
	m.t.Helper()
	if _, err := m.Delete(m.t.Context(), &api.DeleteRequest{Id: id}); err != nil {
		m.t.Error(err)
	}
}

func TestStreamsAndExitCode(t *testing.T) {
	m := newMachine(t)
	io3 := m.create("c1", "cat; echo done >&2; exit 7")
	m.start("c1")
	in := make([]byte, 8<<20)
	_, _ = rand.Read(in) // never fails
	go func() {
		_, _ = io3[stdin].Write(in) // a difference shows in the output
		_ = io3[stdin].CloseWrite()
	}()
	out, err := io.ReadAll(io3[stdout])
	if err != nil || !bytes.Equal(in, out) {
		t.Errorf("%d bytes came back of %d, error %v", len(out), len(in), err)
	}
	if msg, err := io.ReadAll(io3[stderr]); err != nil || string(msg) != "done\n" {
		t.Errorf("stderr %q, %v", msg, err)
	}
	if code := m.wait("c1"); code != 7 {
		t.Errorf("exit code %d", code)
	}
	m.delete("c1")
	if left, _ := os.ReadDir(filepath.Join(m.cfg.Dir, "bundles")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestOutputIsCompleteForAReaderThatComesLate(t *testing.T) {
	m := newMachine(t)
	io3 := m.create("c1", "i=0; while [ $i -lt 100000 ]; do echo $i; i=$((i+1)); done")
	m.start("c1")
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.Wait(ctx, &api.WaitRequest{Id: "c1"}); !errors.Is(err, context.Canceled) {
		t.Errorf("Wait returned %v while output was waiting", err)
	}
	out, err := io.ReadAll(io3[stdout])
	lines := strings.Split(strings.TrimSuffix(string(out), "\n"), "\n")
	if err != nil || len(lines) != 100000 {
		t.Fatalf("%d lines, %v", len(lines), err)
	}
	for i, l := range lines {
		if l != fmt.Sprint(i) {
			t.Fatalf("line %d is %q", i, l)
		}
	}
	if code := m.wait("c1"); code != 0 {
		t.Errorf("exit code %d", code)
	}
}

func TestSignals(t *testing.T) {
	cases := []struct {
		name, script string
		signal       unix.Signal
		want         int32
	}{
		{"kill", "echo up; while :; do read x; done", unix.SIGKILL, 137},
		{"handled", "trap 'exit 9' TERM; echo up; while :; do sleep 0.05; done", unix.SIGTERM, 9},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			m := newMachine(t)
			io3 := m.create("c1", c.script)
			if _, err := m.Signal(t.Context(), &api.SignalRequest{Id: "c1", Signal: 9}); !errdefs.IsFailedPrecondition(err) {
				t.Errorf("signal before start: %v", err)
			}
			m.start("c1")
			if _, err := io.ReadFull(io3[stdout], make([]byte, 3)); err != nil {
				t.Fatal(err)
			}
			if _, err := m.Signal(t.Context(), &api.SignalRequest{Id: "c1", Signal: 1000}); !errdefs.IsInvalidArgument(err) {
				t.Errorf("signal 1000: %v", err)
			}
			if _, err := m.Signal(t.Context(), &api.SignalRequest{Id: "c1", Signal: uint32(c.signal)}); err != nil {
				t.Fatal(err)
			}
			if code := m.wait("c1"); code != c.want {
				t.Errorf("exit code %d, want %d", code, c.want)
			}
			if _, err := m.Signal(t.Context(), &api.SignalRequest{Id: "c1", Signal: 9}); !errdefs.IsNotFound(err) {
				t.Errorf("signal after the end: %v", err)
			}
		})
	}
}

func TestStartTellsWhyItFailed(t *testing.T) {
	m := newMachine(t)
	if _, err := m.Create(t.Context(), &api.CreateRequest{Id: "c1", Spec: m.spec("/bin/none")}); err != nil {
		t.Fatal(err)
	}
	m.connect("c1")
	_, err := m.Start(t.Context(), &api.StartRequest{Id: "c1"})
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "/bin/none") {
		t.Errorf("error %v", err)
	}
	m.delete("c1")
}

func TestStartWaitsForTheStreams(t *testing.T) {
	m := newMachine(t)
	if _, err := m.Create(t.Context(), &api.CreateRequest{Id: "c1", Spec: m.spec("/bin/sh", "-c", "exit 3")}); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.Start(ctx, &api.StartRequest{Id: "c1"}); !errors.Is(err, context.Canceled) {
		t.Errorf("start without streams: %v", err)
	}
	m.connect("c1")
	m.start("c1")
	if code := m.wait("c1"); code != 3 {
		t.Errorf("exit code %d", code)
	}
}

func TestDeleteEndsEverything(t *testing.T) {
	m := newMachine(t)
	waiting := make(chan error, 1)
	if _, err := m.Create(t.Context(), &api.CreateRequest{Id: "never", Spec: m.spec("/bin/sh")}); err != nil {
		t.Fatal(err)
	}
	go func() {
		_, err := m.Start(context.Background(), &api.StartRequest{Id: "never"})
		waiting <- err
	}()
	m.delete("never")
	if err := <-waiting; err == nil {
		t.Error("the start of a deleted container succeeded")
	}
	// Its output fills every buffer and nobody reads it.
	m.create("stuck", "while :; do echo 0123456789012345678901234567890123456789; done")
	m.start("stuck")
	m.delete("stuck")
	if _, err := m.Wait(t.Context(), &api.WaitRequest{Id: "stuck"}); !errdefs.IsNotFound(err) {
		t.Errorf("wait for a deleted container: %v", err)
	}
}

func TestAContainerLearnsThatItsReaderIsGone(t *testing.T) {
	m := newMachine(t)
	io3 := m.create("c1", "while echo x; do :; done; exit 5")
	m.start("c1")
	if err := io3[stdout].Close(); err != nil {
		t.Fatal(err)
	}
	if code := m.wait("c1"); code == 0 {
		t.Error("exit code 0")
	}
}

func TestRefused(t *testing.T) {
	m := newMachine(t)
	for name, req := range map[string]*api.CreateRequest{
		"id":       {Id: "../x", Spec: m.spec("a")},
		"empty id": {Spec: m.spec("a")},
		"spec":     {Id: "a", Spec: []byte("{")},
		"relative": {Id: "a", Spec: []byte(`{"root":{"path":"rootfs"}}`)},
	} {
		if _, err := m.Create(t.Context(), req); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	m.create("c1", "exit 0")
	if _, err := m.Create(t.Context(), &api.CreateRequest{Id: "c1", Spec: m.spec("a")}); !errdefs.IsAlreadyExists(err) {
		t.Errorf("the same id twice: %v", err)
	}
	if _, err := m.Wait(t.Context(), &api.WaitRequest{Id: "c1"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("wait before start: %v", err)
	}
	for _, hello := range []string{"c1 stdout\n", "c2 stdout\n", "c1 stdlog\n", "\n", strings.Repeat("a", 200) + "\n"} {
		// Refused: the connection is closed, with or without a reset.
		if n, err := m.dial(hello).Read(make([]byte, 1)); n > 0 || err == nil {
			t.Errorf("%q was accepted", hello)
		}
	}
	m.start("c1")
	if _, err := m.Start(t.Context(), &api.StartRequest{Id: "c1"}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("the second start: %v", err)
	}
}

func FuzzHello(f *testing.F) {
	f.Add("c1 stdout\nrest")
	f.Add("c1  stdin\n")
	f.Add("a/b stderr\n")
	f.Fuzz(func(t *testing.T, s string) {
		r := strings.NewReader(s)
		id, stream, err := readHello(r)
		if err == nil && !strings.HasPrefix(s, id+" "+stream.String()+"\n") {
			t.Errorf("%q gave %q, %v", s, id, stream)
		}
	})
}
