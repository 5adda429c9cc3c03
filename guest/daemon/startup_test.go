package daemon

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/imageservice/cdh"
)

// TestSocketsComeFirst: kata-agent looks for its socket once. Nothing that can
// take its time may come before.
func TestSocketsComeFirst(t *testing.T) {
	g := startGuest(t, newNode(t))
	log := g.log.String()
	listening, session := strings.Index(log, `"msg":"started"`), strings.Index(log, `"msg":"FUSE session mounted"`)
	if listening < 0 || session < 0 || listening > session {
		t.Errorf("the order of the start is another:\n%s", log)
	}
}

// TestReady waits for what a service manager is told.
func TestReady(t *testing.T) {
	for _, name := range []string{"@" + filepath.Base(t.TempDir()) + t.Name(), filepath.Join(t.TempDir(), "notify")} {
		manager, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
		if err != nil {
			t.Fatal(err)
		}
		defer manager.Close()
		t.Setenv("NOTIFY_SOCKET", name)
		g := startGuest(t, newNode(t))
		var b [64]byte
		if err := manager.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		read, err := manager.Read(b[:])
		if err != nil || string(b[:read]) != "READY=1\n" {
			t.Errorf("the service manager was told %q, %v", b[:read], err)
		}
		if env, err := os.ReadFile(fmt.Sprintf("/proc/%d/environ", g.workerPID())); err != nil || strings.Contains(string(env), "NOTIFY_SOCKET") {
			t.Errorf("the worker can speak for its supervisor (%v)", err)
		}
	}
}

// TestSettingsOfThePod starts tatami-guest as the extension image does when the
// pod's initdata has a cdh.toml.
func TestSettingsOfThePod(t *testing.T) {
	n := newNode(t)
	hub := newHub(t)
	dir := t.TempDir()
	pod, theirs := filepath.Join(dir, "cdh.toml"), filepath.Join(dir, "hub", "cdh.toml")
	text := "[kbc]\nname = \"cc_kbc\"\nurl = \"http://kbs\"\n[tatami]\nversion = 1\nlog_level = \"debug\"\n"
	if err := os.WriteFile(pod, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	g := startGuest(t, n, "--cdh-forward", hub, "--cdh-forward-config", theirs, "-c", pod)
	b, err := os.ReadFile(theirs)
	if err != nil || !strings.Contains(string(b), "unix://"+hub) || !strings.Contains(string(b), "http://kbs") || strings.Contains(string(b), "tatami") {
		t.Errorf("configuration of the hub: %v\n%s", err, b)
	}
	agent := g.dial("cdh")
	defer agent.Close()
	out, err := cdh.NewSealedSecretServiceClient(agent).UnsealSecret(t.Context(), &cdh.UnsealSecretInput{Secret: []byte("s")})
	if err != nil || string(out.Plaintext) != "open s" {
		t.Errorf("%v, %v", out, err)
	}
}

// BenchmarkStart measures from the start of the real program until kata-agent
// could connect.
func BenchmarkStart(b *testing.B) {
	if os.Getuid() != 0 {
		b.Skip("needs root: mounts FUSE")
	}
	program := filepath.Join(b.TempDir(), "tatami-guest")
	build := exec.CommandContext(b.Context(), "go", "build", "-trimpath", "-ldflags=-s -w", "-o", program, "../cmd/tatami-guest")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	for b.Loop() {
		startOnce(b, program)
	}
}

// startOnce counts only the time until a connection was accepted.
func startOnce(b *testing.B, program string) {
	b.StopTimer()
	dir := b.TempDir()
	socket := filepath.Join(dir, "cdh.sock")
	cmd := exec.CommandContext(context.Background(), program, "--listen", "unix:"+filepath.Join(dir, "guest"), "--cdh-socket", socket,
		"--state-dir", filepath.Join(dir, "state"), "--registry=false")
	b.StartTimer()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	var d net.Dialer
	conn, err := d.DialContext(b.Context(), "unix", socket)
	for deadline := time.Now().Add(time.Minute); err != nil && time.Now().Before(deadline); {
		time.Sleep(100 * time.Microsecond)
		conn, err = d.DialContext(b.Context(), "unix", socket)
	}
	b.StopTimer()
	if err == nil {
		err = conn.Close()
	}
	_ = cmd.Process.Signal(unix.SIGTERM) // Wait says what came of it
	if endErr := cmd.Wait(); err != nil || endErr != nil {
		b.Fatal(err, endErr)
	}
	b.StartTimer()
}
