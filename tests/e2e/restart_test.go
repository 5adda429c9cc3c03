package e2e

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	specs "github.com/opencontainers/runtime-spec/specs-go"

	"github.com/tatami-containers/tatami/protocols/imageservice/cdh"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// The image that is read while the node's daemon is restarted: far more than a
// guest keeps of what it reads ahead.
const (
	slowFiles = 48
	slowSize  = 2 << 20
)

// Both ways in which a sandbox comes to be attached: it is found as Kata makes
// it, or somebody says so on the control socket. Between the two daemons the
// guest's reads wait, then they go on; no read fails, no byte is wrong. The
// guest is a real one, on this machine.
func TestHostRestarts(t *testing.T) {
	need(t)
	for _, found := range []bool{true, false} {
		t.Run(map[bool]string{true: "found", false: "attached"}[found], func(t *testing.T) {
			r := newRig(t)
			var entries []registrytest.Entry
			for i := range slowFiles {
				entries = append(entries, registrytest.File(fmt.Sprintf("f%02d", i), 0o644, noise(uint64(i), slowSize)))
			}
			l := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar(entries...))))
			r.reg.PushImage("slow", "v1", registrytest.Image{Layers: []registrytest.Layer{l}})
			n := &hostNode{rig: r, dir: t.TempDir()}
			n.start()
			if found {
				n.kata("one", "c1", r.ref("slow:v1"))
			} else {
				n.attach("one", "c1", r.ref("slow:v1"))
			}
			root := n.guest("one", "c1", r.ref("slow:v1"))
			r.reg.Close() // from here on the node has all
			read := startReading(root)
			for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
				read.await(t, read.files.Load()+4)
				n.end(sig)
				before := read.files.Load()
				time.Sleep(300 * time.Millisecond) // reads go on as far as was read ahead
				if got := read.files.Load(); got == slowFiles {
					t.Fatalf("all was read without the node: %d files of %d before", before, got)
				}
				n.start()
			}
			read.await(t, slowFiles)
			if err := <-read.done; err != nil {
				t.Error(err)
			}
		})
	}
}

// hostNode is a tatami-host on the rig, with what Kata and containerd have on a
// node.
type hostNode struct {
	*rig
	dir string
	cmd *exec.Cmd
}

// uds is the socket of a sandbox's VMM.
func (n *hostNode) uds(id string) string { return filepath.Join(n.dir, "kata", id, "vm.sock") }

// start runs tatami-host and waits until it serves.
func (n *hostNode) start() {
	n.t.Helper()
	settings := filepath.Join(n.dir, "host.toml")
	text := fmt.Sprintf("version = 1\nroot = %q\n[kata]\ndiscover = true\nrun_dirs = [%q]\ncontainerd_state = %q\n",
		n.root, filepath.Join(n.dir, "kata"), filepath.Join(n.dir, "containerd"))
	if err := os.WriteFile(settings, []byte(text), 0o600); err != nil {
		n.t.Fatal(err)
	}
	log, err := os.OpenFile(filepath.Join(n.root, "tatami-host.log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		n.t.Fatal(err)
	}
	defer log.Close()
	n.cmd = exec.CommandContext(context.Background(), filepath.Join(bin, "tatami-host"), "--config", settings)
	n.cmd.Stderr = log
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := n.cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	cmd := n.cmd
	n.t.Cleanup(func() {
		if n.cmd == cmd {
			n.end(syscall.SIGTERM)
		}
	})
}

// end ends tatami-host with a signal.
func (n *hostNode) end(sig syscall.Signal) {
	n.t.Helper()
	err := n.cmd.Process.Signal(sig)
	_ = n.cmd.Wait() // a signal is no success
	n.cmd = nil
	if err != nil {
		n.t.Errorf("tatami-host: %v\n%s", err, n.hostLog())
	}
}

// dial waits for a socket.
func (n *hostNode) dial(path string) *ttrpc.Client {
	n.t.Helper()
	for end := time.Now().Add(time.Minute); ; time.Sleep(5 * time.Millisecond) {
		c, err := new(net.Dialer).DialContext(n.t.Context(), "unix", path)
		if err == nil {
			client := ttrpc.NewClient(c)
			n.t.Cleanup(func() { _ = client.Close() }) // the test is over
			return client
		}
		if time.Now().After(end) {
			n.t.Fatalf("nobody listens: %v\n%s", err, n.hostLog())
		}
	}
}

// kata makes a sandbox and a container as Kata and containerd do, with a shim
// that answers as runtime-rs does (crates/runtimes/src/shim_mgmt/handlers.rs).
func (n *hostNode) kata(sandbox, container, ref string) {
	n.t.Helper()
	bundle := filepath.Join(n.dir, "containerd", "io.containerd.runtime.v2.task", "k8s.io", container)
	spec, err := json.Marshal(specs.Spec{Version: specs.Version, Annotations: map[string]string{
		"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": sandbox, "io.kubernetes.cri.image-name": ref,
	}})
	err = errors.Join(err, os.MkdirAll(bundle, 0o700), os.WriteFile(filepath.Join(bundle, "config.json"), spec, 0o600),
		os.MkdirAll(filepath.Dir(n.uds(sandbox)), 0o700))
	if err != nil {
		n.t.Fatal(err)
	}
	l, err := new(net.ListenConfig).Listen(n.t.Context(), "unix", filepath.Join(filepath.Dir(n.uds(sandbox)), "shim-monitor.sock"))
	if err != nil {
		n.t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /agent-url", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintf(w, "hvsock://%s:1024", n.uds(sandbox)) })
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: patience}
	go func() { _ = srv.Serve(l) }()        // ends with Close
	n.t.Cleanup(func() { _ = srv.Close() }) // the sandbox is over
}

// attach says on the control socket that there is a sandbox with a container.
func (n *hostNode) attach(sandbox, container, ref string) {
	n.t.Helper()
	if err := os.MkdirAll(filepath.Dir(n.uds(sandbox)), 0o700); err != nil {
		n.t.Fatal(err)
	}
	node := api.NewNodeClient(n.dial(filepath.Join(n.root, "tatami-host.sock")))
	_, err := node.Attach(n.t.Context(), &api.AttachRequest{
		Sandbox: sandbox, HostAddress: "hybrid:" + n.uds(sandbox) + ":2110", RelayAddress: "hybrid:" + n.uds(sandbox) + ":2111",
	})
	if err == nil {
		_, err = node.AddContainer(n.t.Context(), &api.AddContainerRequest{Sandbox: sandbox, ContainerId: container, Reference: ref})
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

// guest starts a tatami-guest that reaches the node as the sandbox's VMM would
// let it, and pulls as kata-agent does. It returns the container's root.
func (n *hostNode) guest(sandbox, container, ref string) string {
	n.t.Helper()
	at := func(name string) string { return filepath.Join(n.dir, name) }
	cmd := exec.CommandContext(context.Background(), filepath.Join(bin, "tatami-guest"),
		"--listen", "unix:"+at("guest"), "--stream-listen", "unix:"+at("streams"), "--cdh-socket", at("cdh"), "--state-dir", at("state"),
		"--host-address", "unix:"+n.uds(sandbox)+"_2110", "--relay-address", "unix:"+n.uds(sandbox)+"_2111", "--registry", "false")
	log := newGrowing()
	cmd.Stderr = log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	n.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM) // it unmounts
		if err := cmd.Wait(); err != nil || n.t.Failed() {
			n.t.Errorf("tatami-guest: %v\n%s\ntatami-host:\n%s", err, log.String(), n.hostLog())
		}
	})
	n.dial(n.uds(sandbox) + "_2110") // a VMM's guest is started after its sandbox
	agent := cdh.NewImagePullServiceClient(n.dial(at("cdh")))
	ctx, cancel := context.WithTimeout(n.t.Context(), patience)
	defer cancel()
	if _, err := agent.PullImage(ctx, &cdh.ImagePullRequest{ImageUrl: ref, BundlePath: at(container)}); err != nil {
		n.t.Fatal(err)
	}
	return filepath.Join(at(container), "rootfs")
}

// reading reads the image once.
type reading struct {
	files atomic.Int64 // that were read
	done  chan error   // has one element at the end
}

func startReading(root string) *reading {
	r := &reading{done: make(chan error, 1)}
	go func() {
		var errs []error
		for i := range slowFiles {
			data, err := os.ReadFile(filepath.Join(root, fmt.Sprintf("f%02d", i)))
			if err == nil && string(data) != noise(uint64(i), slowSize) {
				err = fmt.Errorf("file %d has %d bytes, some of them wrong", i, len(data))
			}
			errs = append(errs, err)
			r.files.Add(1)
		}
		r.done <- errors.Join(errs...)
	}()
	return r
}

// await waits until n files were read.
func (r *reading) await(t *testing.T, n int64) {
	t.Helper()
	for end := time.Now().Add(patience); r.files.Load() < min(n, slowFiles); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d files of %d were read", r.files.Load(), n)
		}
	}
}
