package katavm

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/ttrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/tests/katavm/kata"
	"github.com/tatami-containers/tatami/tests/katavm/shim"
	"github.com/tatami-containers/tatami/tests/vmtest"
)

// cdhConfig is what a pod's initdata has for the Confidential Data Hub, with
// settings of tatami-guest.
const cdhConfig = `
socket = "unix:///run/confidential-containers/cdh.sock"
[kbc]
name = "offline_fs_kbc"
url = ""
[tatami]
version = 1
listen = ["vsock:2200"]
state_dir = "/run/from-initdata"
registry = false
`

// TestVerifiedExtension boots with a partitioned image that dm-verity checks, and
// settings from initdata and from the kernel command line, which counts more.
func TestVerifiedExtension(t *testing.T) {
	need(t)
	image, verity := extensionImage(t, "--verity")
	if verity == "" {
		t.Fatal("no verity_params of a verified image")
	}
	h, img := startHost(t), pushImage(t, startRegistry(t), "verified", 5, gzipped)
	s := shim.Start(t, shim.Config{ID: sandboxID, RunDir: h.kata(), ContainerdState: h.containerd(), Extension: image, Verity: verity,
		CDHConfig: cdhConfig, Cmdline: "agent.guest_components_procs=attestation-agent tatami.state_dir=/run/from-cmdline"})
	if mounts := shell(t, s, "grep /run/kata-extensions/coco /proc/mounts"); !strings.HasPrefix(mounts, "/dev/dm-0 ") {
		t.Errorf("the extension is not mounted from a verified device: %s", mounts)
	}
	r := &guestRig{host: h, snapshots: h.snapshotter(t, guestMode), sandbox: s}
	r.create(t, "verified", img, "/bin/cat", "/etc/name")
	if got := output(t, s, "verified"); got != "verified\n" {
		t.Errorf("output %q", got)
	}
	if got := list(t, s.GuestAddress(2200)); len(got) != 1 || got[0].Id != "verified" {
		t.Errorf("mounts of the guest that listens where initdata says: %v", got)
	}
	shell(t, s, "test -e /run/from-cmdline/mounts/verified.json -a ! -e /run/from-initdata")
}

// list asks a tatami-guest for its mounts.
func list(t *testing.T, addr string) []*api.Mount {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn, err := vsock.Dial(ctx, addr)
	if err != nil {
		t.Fatal(err)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	resp, err := api.NewGuestClient(client).List(ctx, &api.ListRequest{})
	if err != nil {
		t.Fatal(err)
	}
	return resp.Mounts
}

// TestRefusedExtension boots with images that must not be mounted: the guest
// switches itself off before its agent answers.
func TestRefusedExtension(t *testing.T) {
	need(t)
	image, verity := extensionImage(t, "--verity")
	for _, c := range []struct {
		name, cmdline, want string
		change              func(t *testing.T) string
	}{
		{"verity stripped", "kata.extension.coco.verity_params", "no verity_params", func(*testing.T) string { return image }},
		{"changed", "kata.extension.coco.verity_params=" + verity, "mount extension coco", func(t *testing.T) string { return changed(t, image) }},
	} {
		t.Run(c.name, func(t *testing.T) {
			m := vmtest.Start(t, vmtest.Options{Init: shim.Agent, Cmdline: c.cmdline, Modules: []string{"virtio_blk"}, OptionalModules: []string{"dm_verity"},
				Args: shim.ExtensionDisk(c.change(t))})
			ctx, cancel := context.WithTimeout(t.Context(), patience)
			defer cancel()
			err := m.WaitReady(ctx, func(ctx context.Context) error {
				conn, err := vsock.Dial(ctx, m.GuestAddress(kata.AgentPort))
				if err == nil {
					err = errors.Join(conn.Close(), errors.New("the agent listens"))
				}
				return err
			})
			if console := m.Console(); ctx.Err() != nil || !strings.Contains(console, c.want) || strings.Contains(console, "agent serves") {
				t.Errorf("%v; console without %q, or the agent serves:\n%s", err, c.want, console)
			}
		})
	}
}

// changed is a copy of an image with another first block of its file system,
// which begins at 1 MiB.
func changed(t *testing.T, image string) string {
	t.Helper()
	b, err := os.ReadFile(image)
	if err != nil {
		t.Fatal(err)
	}
	b[1<<20+2000] ^= 1
	file := filepath.Join(t.TempDir(), "changed.img")
	if err := os.WriteFile(file, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}
