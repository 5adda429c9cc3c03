// Package shim stands in for Kata's runtime-rs on a node without Kata: it starts
// a virtual machine whose agent is ../agent, with the guest extension image as a
// disk, serves the shim's management socket, and turns the mount list of a
// snapshotter into what the agent is asked for. What containerd does around a
// shim, the bundle with its config.json, is here as well.
package shim

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/tests/katavm/kata"
	"github.com/tatami-containers/tatami/tests/vmtest"
	"github.com/tatami-containers/tatami/tools/vm"
)

// Agent is the package of the stand-in for kata-agent, an init.
const Agent = "github.com/tatami-containers/tatami/tests/katavm/agent"

const (
	monitorSocket = "shim-monitor.sock" // src/libs/shim-interface/src/lib.rs
	// ports is how many disks can be plugged in.
	ports     = 6
	firstSlot = 0x10 // PCI slot of the first port
)

// Config describes a sandbox.
type Config struct {
	ID string
	// RunDir is /run/kata on a node: the sandbox has a directory in it.
	RunDir string
	// ContainerdState is /run/containerd on a node.
	ContainerdState string
	// Extension is the file of the guest extension image "coco", Verity its
	// verity_params; "" for an image without.
	Extension, Verity string
	// CDHConfig is passed as "cdh.toml" in an initdata device; "" for none.
	CDHConfig string
	Cmdline   string // more words, as kernel_params
}

// Sandbox is a running virtual machine with its agent.
type Sandbox struct {
	*vm.VM
	t      testing.TB
	cfg    Config
	client *http.Client
	qmp    *qmp

	mu    sync.Mutex       // one container is created or removed at a time where disks are plugged
	plugs map[string][]int // ports by container; protected by mu
}

// Start boots a sandbox and waits for its agent. It ends with the test.
func Start(t testing.TB, cfg Config) *Sandbox {
	t.Helper()
	dir := filepath.Join(cfg.RunDir, cfg.ID)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		t.Fatal(err)
	}
	s := &Sandbox{t: t, cfg: cfg, plugs: map[string][]int{}}
	monitor := filepath.Join(dir, "qmp.sock")
	args := append(cfg.disks(t), "-qmp", "unix:"+monitor+",server=on,wait=off")
	for i := range ports {
		args = append(args, "-device", fmt.Sprintf("pcie-root-port,id=%s,chassis=%d,slot=%d,addr=0x%x", port(i), i+1, i+1, firstSlot+i))
	}
	s.VM = vmtest.Start(t, vmtest.Options{
		Init: Agent, Cmdline: strings.TrimSpace(cfg.extensionParameter() + " " + cfg.Cmdline),
		Modules: []string{"virtio_blk"}, OptionalModules: []string{"dm_verity"}, Args: args,
		Dir: dir, // as with every VMM of Kata, the socket lies below a directory of the sandbox's name
	})
	s.serveMonitor(filepath.Join(dir, monitorSocket))
	s.client = &http.Client{Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return vsock.Dial(ctx, s.GuestAddress(kata.AgentPort))
		}}}
	vmtest.WaitReady(t, s.VM, func(ctx context.Context) error {
		_, err := s.Shell(ctx, "true")
		return err
	})
	var err error
	if s.qmp, err = dialQMP(t.Context(), monitor); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = s.qmp.conn.Close() }) // the machine may have ended
	return s
}

func port(i int) string { return fmt.Sprintf("rp%d", i) }

// extensionParameter is what the runtime puts on the kernel command line for an
// image (src/runtime-rs/crates/hypervisor/src/qemu/cmdline_generator.rs).
func (c *Config) extensionParameter() string {
	switch {
	case c.Extension == "":
		return ""
	case c.Verity == "":
		return "kata.extension.coco.verity_params"
	}
	return "kata.extension.coco.verity_params=" + c.Verity
}

// disks are QEMU's arguments for the disks that are there from the start.
func (c *Config) disks(t testing.TB) []string {
	var args []string
	if c.Extension != "" {
		args = ExtensionDisk(c.Extension)
	}
	if c.CDHConfig != "" {
		args = append(args, readOnlyDisk("initdata", initdata(t, c.CDHConfig), "")...)
	}
	return args
}

// ExtensionDisk is QEMU's arguments for the extension image "coco"
// (src/runtime-rs/crates/hypervisor/src/qemu/cmdline_generator.rs).
func ExtensionDisk(file string) []string {
	return readOnlyDisk("extension", file, ",serial=extension-coco")
}

func readOnlyDisk(id, file, properties string) []string {
	return []string{"-drive", "if=none,format=raw,readonly=on,id=" + id + ",file=" + file,
		"-device", "virtio-blk-pci,drive=" + id + properties}
}

// initdata writes an initdata device (src/libs/kata-types/src/initdata.rs and
// src/runtime-rs/crates/resource/src/initdata_block.rs).
func initdata(t testing.TB, cdh string) string {
	text := "version = \"0.1.0\"\nalgorithm = \"sha256\"\n[data]\n\"cdh.toml\" = '''\n" + cdh + "'''\n"
	var z bytes.Buffer
	w := gzip.NewWriter(&z)
	_, _ = w.Write([]byte(text)) // never fails
	_ = w.Close()
	b := binary.LittleEndian.AppendUint64([]byte("initdata"), uint64(z.Len()))
	b = append(b, z.Bytes()...)
	b = append(b, make([]byte, 512-len(b)%512)...)
	file := filepath.Join(t.TempDir(), "initdata.img")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// serveMonitor serves the shim's management socket, of which others read where
// the agent is (src/runtime-rs/crates/runtimes/src/shim_mgmt/handlers.rs).
func (s *Sandbox) serveMonitor(path string) {
	s.t.Helper()
	l, err := vsock.Listen("unix:" + path)
	if err != nil {
		s.t.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /agent-url", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprint(w, s.agentURL()) // the peer may be gone
	})
	srv := &http.Server{Handler: mux, ReadHeaderTimeout: time.Minute}
	go func() { _ = srv.Serve(l) }() // ends with Close
	s.t.Cleanup(func() {
		_ = srv.Close()
		_ = os.RemoveAll(filepath.Dir(path))
	})
}

func (s *Sandbox) agentURL() string {
	a, err := vsock.ParseAddress(s.GuestAddress(kata.AgentPort))
	if err != nil {
		return ""
	}
	if a.Network == vsock.VSock {
		return fmt.Sprintf("vsock://%d:%d", a.CID, a.Port)
	}
	return fmt.Sprintf("hvsock://%s:%d", a.Path, a.Port)
}

// Create makes a container of a snapshotter's mount list. annotations are the
// CRI's; without the sandbox among them it is this one.
func (s *Sandbox) Create(ctx context.Context, id string, mounts []Mount, spec *specs.Spec, annotations map[string]string) error {
	spec.Annotations = map[string]string{kata.SandboxID: s.cfg.ID}
	for key, value := range annotations {
		spec.Annotations[key] = value
	}
	if err := s.writeBundle(id, spec); err != nil {
		return err
	}
	r, err := newRootfs(id, mounts, spec.Annotations)
	if err != nil {
		return err
	}
	if err := s.plugIn(id, r); err != nil {
		return err
	}
	spec.Root = &specs.Root{Path: r.path}
	return s.call(ctx, kata.PathCreate, kata.CreateRequest{ContainerID: id, Storages: r.storages, OCI: spec}, nil)
}

// plugIn attaches the disks of a container and tells its storages where they are.
func (s *Sandbox) plugIn(id string, r *rootfs) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, d := range r.disks {
		n := s.freePort()
		if err := s.qmp.attach(d, port(n)); err != nil {
			return fmt.Errorf("attach %s: %w", d.file, err)
		}
		s.plugs[id] = append(s.plugs[id], n)
		r.storages[i].Source = fmt.Sprintf("%02x/00", firstSlot+n)
	}
	return nil
}

// freePort is the first port without a disk; ports when there is none, which
// QEMU refuses. Precondition: s.mu is held.
func (s *Sandbox) freePort() int {
	used := map[int]bool{}
	for _, list := range s.plugs {
		for _, n := range list {
			used[n] = true
		}
	}
	for n := range ports {
		if !used[n] {
			return n
		}
	}
	return ports
}

// Start starts the process of a container.
func (s *Sandbox) Start(ctx context.Context, id string) error {
	return s.call(ctx, kata.PathStart, kata.ContainerRequest{ContainerID: id}, nil)
}

// Wait waits for the end of a container's process.
func (s *Sandbox) Wait(ctx context.Context, id string) (out kata.Output, err error) {
	return out, s.call(ctx, kata.PathWait, kata.ContainerRequest{ContainerID: id}, &out)
}

// Remove removes a container: the agent's part, then the disks, then containerd's
// bundle. An error of the agent is returned in the end; as in the real shim it
// stops nothing (src/runtime-rs/crates/runtimes/virt_container/src/
// container_manager/container_inner.rs, cleanup_container with force).
func (s *Sandbox) Remove(ctx context.Context, id string) error {
	agentErr := s.call(ctx, kata.PathRemove, kata.ContainerRequest{ContainerID: id}, nil)
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.plugs[id] {
		if err := s.qmp.detach(port(n)); err != nil {
			return errors.Join(agentErr, err)
		}
	}
	delete(s.plugs, id)
	return errors.Join(agentErr, os.RemoveAll(s.bundle(id)))
}

// Shell runs a script in the guest, beside the containers.
func (s *Sandbox) Shell(ctx context.Context, script string) (out kata.Output, err error) {
	return out, s.call(ctx, kata.PathShell, kata.ShellRequest{Script: script}, &out)
}
