package formats

import (
	"bytes"
	"context"
	"encoding/gob"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tests/treecmp"
	"github.com/tatami-containers/tatami/tests/vmtest"
	"github.com/tatami-containers/tatami/tools/bundle"
)

// mountPoints are what the runtime puts into a container. Making them changes
// the time of its root directory, too.
var mountPoints = []string{"proc", "sys", "dev"}

// TestInAVirtualMachine boots one guest and runs a container from each format
// in it, which tells the tree that it sees.
func TestInAVirtualMachine(t *testing.T) {
	need(t, "docker-registry", "crun")
	vmtest.Need(t)
	reg, n := startRegistry(t), newNode(t)
	host := n.serve(t)
	guest := vmtest.Boot(t, vmtest.Options{MemoryMiB: 384, Cmdline: "tatami.runner=true tatami.cdh_socket= tatami.registry=false"})
	_, err := host.Attach(t.Context(), &api.AttachRequest{Sandbox: "vm", HostAddress: guest.HostAddress(vsock.HostPort),
		RelayAddress: guest.HostAddress(vsock.RelayPort), Cid: guest.CID()})
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range formats {
		t.Run(f.name, func(t *testing.T) {
			needFormat(t, f)
			tars := f.edit(t, append(torture.Layers(), treedump(t)))
			ref := f.push(t, reg, tars)
			if _, err := host.Prepare(t.Context(), &api.PrepareRequest{Reference: ref}); err != nil {
				t.Fatal(err)
			}
			if _, err := host.AddContainer(t.Context(), &api.AddContainerRequest{Sandbox: "vm", ContainerId: f.name, Reference: ref}); err != nil {
				t.Fatal(err)
			}
			got := inside(t, guest, f.name, ref)
			want := overlaid(t, tars, mountPoints...)
			delete(got, ".")
			delete(want, ".")
			compare(t, got, f.expect(want), treecmp.Nlink)
		})
	}
}

// treedump is a layer with the program that tells a tree.
func treedump(t *testing.T) []byte {
	t.Helper()
	b, err := os.ReadFile(filepath.Join(bin, "treedump"))
	if err != nil {
		t.Fatal(err)
	}
	l := torture.NewTar()
	l.File("treedump", string(b), torture.Mode(0o755))
	return l.Bytes()
}

// inside mounts an image in the guest, runs the program in it and unmounts.
func inside(t *testing.T, guest *vmtest.Guest, id, ref string) treecmp.Tree {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	mounted, err := guest.Guest.Mount(ctx, &api.MountRequest{Id: id, Reference: ref, Target: "/run/" + id + "/rootfs"})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if _, err := guest.Guest.Unmount(ctx, &api.UnmountRequest{Id: id}); err != nil {
			t.Error(err)
		}
	}()
	var config ocispec.Image
	if err := json.Unmarshal(mounted.Config, &config); err != nil {
		t.Fatal(err)
	}
	spec, err := bundle.Spec(config.Config, append([]string{"/treedump", "/"}, mountPoints...), id)
	if err != nil {
		t.Fatal(err)
	}
	out, err := container(ctx, guest, id, spec)
	if err != nil {
		t.Fatal(err)
	}
	var tree treecmp.Tree
	if err := gob.NewDecoder(bytes.NewReader(out)).Decode(&tree); err != nil {
		t.Fatal(err)
	}
	return tree
}

// container runs one in the guest and returns its standard output.
func container(ctx context.Context, guest *vmtest.Guest, id string, spec any) (out []byte, err error) {
	b, err := json.Marshal(spec)
	if err != nil {
		return nil, err
	}
	if _, err := guest.Runner.Create(ctx, &api.CreateRequest{Id: id, MountId: id, Spec: b}); err != nil {
		return nil, fmt.Errorf("create: %w", err)
	}
	defer func() {
		if _, err2 := guest.Runner.Delete(ctx, &api.DeleteRequest{Id: id}); err == nil {
			err = err2
		}
	}()
	var streams [3]net.Conn
	for i, s := range []string{"stdin", "stdout", "stderr"} {
		if streams[i], err = vsock.Dial(ctx, guest.GuestAddress(vsock.StreamPort)); err != nil {
			return nil, err
		}
		defer streams[i].Close()
		if _, err := fmt.Fprintf(streams[i], "%s %s\n", id, s); err != nil {
			return nil, err
		}
	}
	if _, err := guest.Runner.Start(ctx, &api.StartRequest{Id: id}); err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	if out, err = io.ReadAll(streams[1]); err != nil {
		return nil, err
	}
	msg, _ := io.ReadAll(streams[2]) // for the error below only
	w, err := guest.Runner.Wait(ctx, &api.WaitRequest{Id: id})
	if err == nil && w.ExitCode != 0 {
		err = fmt.Errorf("exit code %d: %s", w.ExitCode, msg)
	}
	return out, err
}

// serve runs a tatami-host until the test ends and connects to it.
func (n node) serve(t *testing.T) api.NodeService {
	t.Helper()
	log, err := os.Create(filepath.Join(string(n), "tatami-host.log"))
	if err != nil {
		t.Fatal(err)
	}
	defer log.Close()
	cmd := exec.CommandContext(t.Context(), filepath.Join(bin, "tatami-host"), "--root", string(n))
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Wait() }) // t.Context has ended it
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		conn, err := net.Dial("unix", filepath.Join(string(n), "tatami-host.sock"))
		if err == nil {
			client := ttrpc.NewClient(conn)
			t.Cleanup(func() { _ = client.Close() }) // the host may have ended
			return api.NewNodeClient(client)
		}
		if time.Now().After(deadline) {
			t.Fatalf("tatami-host does not listen: %v", err)
		}
	}
}
