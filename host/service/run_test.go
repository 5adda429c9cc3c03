package service

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/tatami-containers/tatami/host/config"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// daemon is a Run under way.
type daemon struct {
	cfg  config.Config
	stop context.CancelFunc
	done chan struct{} // closed when err is set
	err  error
}

func run(t *testing.T, change func(*config.Config)) *daemon {
	t.Helper()
	dir := t.TempDir()
	cfg := config.Default()
	cfg.Root, cfg.Socket, cfg.ImagesSocket = dir, filepath.Join(dir, "tatami-host.sock"), filepath.Join(dir, "images.sock")
	if change != nil {
		change(&cfg)
	}
	ctx, stop := context.WithCancel(t.Context())
	d := &daemon{cfg: cfg, stop: stop, done: make(chan struct{})}
	go func() {
		defer close(d.done)
		d.err = Run(ctx, cfg, Beside{}, slog.New(slog.DiscardHandler))
	}()
	t.Cleanup(func() {
		stop()
		<-d.done
	})
	return d
}

// connect waits for the control socket.
func (d *daemon) connect(t *testing.T) (api.NodeService, *ttrpc.Client) {
	t.Helper()
	for {
		c, err := new(net.Dialer).DialContext(t.Context(), "unix", d.cfg.Socket)
		if err == nil {
			client := ttrpc.NewClient(c)
			t.Cleanup(func() { _ = client.Close() }) // perhaps a second time
			return api.NewNodeClient(client), client
		}
		select {
		case <-d.done:
			t.Fatalf("the daemon ended: %v", d.err)
		case <-time.After(time.Millisecond):
		}
	}
}

func (d *daemon) end(t *testing.T) {
	t.Helper()
	if <-d.done; d.err != nil {
		t.Errorf("run: %v", d.err)
	}
}

// A stopped daemon gives up its root and socket, and the next one has what the
// first prepared.
func TestRun(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	layer := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar(registrytest.File("a", 0o644, "x")))))
	reg.PushImage("library/app", "v1", registrytest.Image{Layers: []registrytest.Layer{layer}})
	req := &api.PrepareRequest{Reference: reg.Host() + "/library/app:v1"}
	d := run(t, nil)
	n, _ := d.connect(t)
	p, err := n.Prepare(t.Context(), req)
	if err != nil || p.Index != "built" || p.Repository != "library/app" || len(p.Phases) == 0 || len(p.Config) == 0 {
		t.Fatalf("prepared %v, %v", p, err)
	}
	if st, err := os.Stat(d.cfg.Socket); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("control socket %v, %v", st, err)
	}
	sandbox := filepath.Join(d.cfg.Root, "vm")
	if _, err := n.Attach(t.Context(), &api.AttachRequest{Sandbox: "s", HostAddress: "unix:" + sandbox + "h", RelayAddress: "unix:" + sandbox + "r"}); err != nil {
		t.Fatal(err)
	}
	d.stop()
	d.end(t)
	for _, path := range []string{d.cfg.Socket, sandbox + "h", sandbox + "r"} {
		if _, err := os.Lstat(path); err == nil {
			t.Errorf("%s is left", path)
		}
	}
	again := run(t, func(c *config.Config) { *c = d.cfg })
	n, _ = again.connect(t)
	if p, err := n.Prepare(t.Context(), req); err != nil || p.Index != "node" {
		t.Errorf("after a restart: %v, %v", p, err)
	}
	again.stop()
	again.end(t)
}

// Errors arrive at the client with their class and text.
func TestErrorsOverTheSocket(t *testing.T) {
	d := run(t, nil)
	n, _ := d.connect(t)
	_, err := n.Prepare(t.Context(), &api.PrepareRequest{Reference: "!"})
	if err = errgrpc.ToNative(err); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), `"!"`) {
		t.Errorf("a bad reference: %v", err)
	}
	_, err = n.Detach(t.Context(), &api.DetachRequest{Sandbox: "x"})
	if err = errgrpc.ToNative(err); !errdefs.IsNotFound(err) {
		t.Errorf("an unknown sandbox: %v", err)
	}
	_, err = n.Remove(t.Context(), &api.RemoveRequest{ManifestDigest: "x"})
	if err = errgrpc.ToNative(err); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad digest: %v", err)
	}
	if p, err := n.Progress(t.Context(), &api.ProgressRequest{Reference: "x"}); err != nil || p.Phase != "" {
		t.Errorf("progress of what is not known: %v, %v", p, err)
	}
}

// A second daemon on the same root says who has it.
func TestSecondHost(t *testing.T) {
	d := run(t, nil)
	d.connect(t)
	other := d.cfg
	other.Socket += "2"
	err := Run(t.Context(), other, Beside{}, slog.New(slog.DiscardHandler))
	if !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "pid "+strconv.Itoa(os.Getpid())) || !strings.Contains(err.Error(), d.cfg.Socket) {
		t.Errorf("error: %v", err)
	}
	other.Root = t.TempDir()
	other.Socket = d.cfg.Socket
	if err := Run(t.Context(), other, Beside{}, slog.New(slog.DiscardHandler)); !errdefs.IsAlreadyExists(err) {
		t.Errorf("another root, the same socket: %v", err)
	}
	d.connect(t) // the first was not disturbed
}

// stays gives the daemon the time to end, which it must not.
func (d *daemon) stays(t *testing.T) {
	t.Helper()
	select {
	case <-d.done:
		t.Fatalf("ended while it was in use: %v", d.err)
	case <-time.After(100 * time.Millisecond):
	}
}

// With idle_exit the daemon ends with its last connection, and takes the
// sandboxes of clients that were killed with it.
func TestIdleExit(t *testing.T) {
	d := run(t, func(c *config.Config) { c.IdleExit = true })
	n, first := d.connect(t)
	other, second := d.connect(t)
	if _, err := other.NodeStats(t.Context(), &api.NodeStatsRequest{}); err != nil {
		t.Fatal(err) // it counts from when it was accepted
	}
	at := filepath.Join(d.cfg.Root, "vm")
	if _, err := n.Attach(t.Context(), &api.AttachRequest{Sandbox: "s", HostAddress: "unix:" + at + "h", RelayAddress: "unix:" + at + "r"}); err != nil {
		t.Fatal(err)
	}
	if err := first.Close(); err != nil {
		t.Fatal(err)
	}
	d.stays(t)
	if err := second.Close(); err != nil {
		t.Fatal(err)
	}
	d.end(t)
	if _, err := os.Stat(at + "h"); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("socket of the sandbox: %v, want none", err)
	}
}

// Without it, it stays.
func TestNoIdleExit(t *testing.T) {
	d := run(t, nil)
	_, client := d.connect(t)
	if err := client.Close(); err != nil {
		t.Fatal(err)
	}
	d.connect(t)
	d.stop()
	d.end(t)
}

// A Prepare under way at the end may finish.
func TestStopFinishesCalls(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	layer := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar(registrytest.File("a", 0o644, "x")))))
	pushed := reg.PushImage("library/app", "v1", registrytest.Image{Layers: []registrytest.Layer{layer}})
	blob := pushed.Layers[0].Digest.String()
	reg.Fault(blob, 1, registrytest.Delay(200*time.Millisecond))
	d := run(t, nil)
	n, _ := d.connect(t)
	called := make(chan error, 1)
	go func() {
		_, err := n.Prepare(t.Context(), &api.PrepareRequest{Reference: reg.Host() + "/library/app:v1"})
		called <- err
	}()
	for len(reg.Requests(blob)) == 0 {
		time.Sleep(time.Millisecond)
	}
	d.stop()
	if err := <-called; err != nil {
		t.Errorf("the call: %v", err)
	}
	d.end(t)
}

// The mirror serves where the settings say; without its address sandboxes are served
// all the same.
func TestMirror(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	reg.PushImage("library/app", "v1", registrytest.Image{})
	l, err := new(net.ListenConfig).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := l.Addr().String()
	taken := run(t, func(c *config.Config) { c.Mirror.Address = address })
	taken.connect(t)
	taken.stop()
	taken.end(t)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	d := run(t, func(c *config.Config) { c.Mirror.Address = address })
	d.connect(t)
	get := func() (*http.Response, error) {
		req, err := http.NewRequestWithContext(t.Context(), "GET", "http://"+address+"/v2/library/app/manifests/v1?ns="+reg.Host(), nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err == nil {
			resp.Body.Close()
		}
		return resp, err
	}
	if resp, err := get(); err != nil || resp.StatusCode != 200 {
		t.Errorf("%v, %v", resp, err)
	}
	d.stop()
	d.end(t)
	if _, err := get(); err == nil {
		t.Error("the mirror serves after the end")
	}
}

// A daemon gives bytes up that are over its bound as soon as it knows what is in use:
// at once, when no sandboxes have to be found.
func TestRunReleasesStore(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{})
	noise := make([]byte, 4<<20)                    // no two chunks are the same
	_, _ = rand.NewChaCha8([32]byte{1}).Read(noise) // has no error
	layer := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar(registrytest.File("a", 0o644, string(noise))))))
	reg.PushImage("library/app", "v1", registrytest.Image{Layers: []registrytest.Layer{layer}})
	d := run(t, nil)
	n, _ := d.connect(t)
	if _, err := n.Prepare(t.Context(), &api.PrepareRequest{Reference: reg.Host() + "/library/app:v1"}); err != nil {
		t.Fatal(err)
	}
	d.stop()
	d.end(t)
	d = run(t, func(c *config.Config) { *c = d.cfg; c.Store.Size, c.Store.Pinned = "1M", nil })
	n, _ = d.connect(t)
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		st, err := n.Status(t.Context(), &api.StatusRequest{})
		if err != nil {
			t.Fatal(err)
		}
		if st.Store.Evicted > 0 && st.Store.Used <= st.Store.High {
			return
		}
		if time.Now().After(end) {
			t.Fatalf("nothing makes way: %v", st.Store)
		}
	}
}
