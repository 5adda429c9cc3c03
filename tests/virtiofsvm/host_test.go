package virtiofsvm

import (
	"context"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	"github.com/opencontainers/go-digest"

	imageservice "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tests/vmtest"
)

// build builds packages of this module into a directory.
func build(t testing.TB, dir string, pkgs ...string) {
	t.Helper()
	cmd := exec.Command("go", append([]string{"build", "-trimpath", "-ldflags=-s -w", "-o", dir + "/"}, pkgs...)...)
	cmd.Dir, cmd.Env = "../..", append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("go build: %v: %s", err, out)
	}
}

// host is a node with tatami-host and an image of a tree.
type host struct {
	t       testing.TB
	service imageservice.NodeService
	root    string
	ref     string
	image   digest.Digest
}

// newHost starts tatami-host, which prepares the image.
func newHost(t testing.TB, bin, base, tree string) *host {
	t.Helper()
	reg := registrytest.Start(t, registrytest.Options{})
	tar, err := exec.Command("tar", "-C", tree, "-c", ".").Output()
	if err != nil {
		t.Fatalf("tar: %v", err)
	}
	reg.PushImage("tree", "v1", registrytest.Image{Layers: []registrytest.Layer{registrytest.Uncompressed(tar)}})
	root := filepath.Join(base, "node")
	cmd := exec.Command(filepath.Join(bin, "tatami-host"), "--root", root, "--plain-http", reg.Host())
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it has nothing to lose
		_ = cmd.Wait()
	})
	n := &host{t: t, service: imageservice.NewNodeClient(dialNode(t, filepath.Join(root, "tatami-host.sock"))), root: root, ref: reg.Host() + "/tree:v1"}
	resp, err := n.service.Prepare(t.Context(), &imageservice.PrepareRequest{Reference: n.ref})
	if err != nil {
		t.Fatal(err)
	}
	n.image = digest.Digest(resp.ManifestDigest)
	return n
}

// serve starts a device with the images of a sandbox.
func (n *host) serve(sandbox, socket string) *daemon {
	n.t.Helper()
	return serve(n.t, nil, "--socket-path", socket, "--shared-dir", n.t.TempDir(), "--images", filepath.Join(n.root, "images.sock"), "--sandbox-id", sandbox)
}

// grant lets a sandbox, the guest's, have the image.
func (n *host) grant(g *guest, sandbox string) {
	n.t.Helper()
	_, err := n.service.Attach(n.t.Context(), &imageservice.AttachRequest{Sandbox: sandbox, Cid: g.CID(),
		HostAddress: g.HostAddress(vsock.HostPort), RelayAddress: g.HostAddress(vsock.RelayPort)})
	if err == nil {
		_, err = n.service.AddContainer(n.t.Context(), &imageservice.AddContainerRequest{Sandbox: sandbox, ContainerId: sandbox, Reference: n.ref})
	}
	if err != nil {
		n.t.Fatal(err)
	}
}

func dialNode(t testing.TB, socket string) *ttrpc.Client {
	t.Helper()
	for range 1000 {
		var d net.Dialer
		if c, err := d.DialContext(t.Context(), "unix", socket); err == nil {
			client := ttrpc.NewClient(c)
			t.Cleanup(func() { _ = client.Close() }) // the host may be gone
			return client
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("tatami-host does not listen on %s", socket)
	return nil
}

// relay has the guest's tatami-guest, which it starts, mount the image, whose bytes
// come over vsock. Precondition: grant.
func (n *host) relay(g *guest, sandbox, target string) {
	n.t.Helper()
	ctx, cancel := context.WithTimeout(n.t.Context(), time.Minute)
	defer cancel()
	g.sh("(/opt/tatami-guest --listen vsock:2100 --cdh-socket= --registry=false --virtiofs=off > /tmp/guest.log 2>&1 &)")
	n.t.Cleanup(func() {
		if n.t.Failed() {
			n.t.Logf("tatami-guest: %s", g.try("cat /tmp/guest.log"))
		}
	})
	var client *ttrpc.Client
	vmtest.WaitReady(n.t, g.VM, func(ctx context.Context) error {
		c, err := vsock.Dial(ctx, g.GuestAddress(vsock.GuestPort))
		if err == nil {
			client = ttrpc.NewClient(c)
		}
		return err
	})
	n.t.Cleanup(func() { _ = client.Close() }) // the guest may be gone
	_, err := imageservice.NewGuestClient(client).Mount(ctx, &imageservice.MountRequest{Id: sandbox, Reference: n.ref, Target: target, ReadOnly: true})
	if err != nil {
		n.t.Fatal(err)
	}
}
