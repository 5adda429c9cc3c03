package isolation

import (
	"context"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// sandbox is a tatami-guest that is attached to a node, and its container.
type sandbox struct {
	*program
	id     string
	class  string
	node   *node
	client *ttrpc.Client
	guest  api.GuestService
	root   string
	there  atomic.Bool // its image is mounted
}

// idle is the prefix of commands of batch sandboxes.
var idle = []string{"chrt", "--idle", "0"}

// newSandbox starts the daemon of a sandbox of a class and attaches it.
func (n *node) newSandbox(tb testing.TB, class string) *sandbox {
	tb.Helper()
	b := n.launch(tb, class)
	check(tb, b.connect(tb.Context()))
	return b
}

// launch starts the daemon of a sandbox and does not wait for it; it ends with the test.
func (n *node) launch(tb testing.TB, class string) *sandbox {
	tb.Helper()
	dir := newDir(tb)
	b := &sandbox{id: filepath.Base(dir), class: class, node: n}
	b.program = start(tb, "tatami-guest", dir, b.prefix(), "--host-address", "unix:DIR/host", "--relay-address", "unix:DIR/relay",
		"--registry", "false", "--log-level", "warn", "--listen", "unix:DIR/guest", "--stream-listen", "unix:DIR/streams", "--cdh-socket", "DIR/cdh", "--state-dir", "DIR/state")
	tb.Cleanup(b.close)
	return b
}

// connect attaches a sandbox to its node and waits for its daemon.
func (b *sandbox) connect(ctx context.Context) error {
	_, err := b.node.api.Attach(ctx, &api.AttachRequest{Sandbox: b.id, HostAddress: "unix:" + b.path("host"), RelayAddress: "unix:" + b.path("relay")})
	if err != nil {
		return errgrpc.ToNative(err)
	}
	if b.client, err = b.dial(ctx, "guest"); err != nil {
		return err
	}
	b.guest = api.NewGuestClient(b.client)
	return nil
}

func (b *sandbox) prefix() []string {
	if b.class == "batch" {
		return idle
	}
	return nil
}

// mount mounts an image that the node has prepared.
func (b *sandbox) mount(ctx context.Context, ref string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	if _, err := b.node.api.AddContainer(ctx, &api.AddContainerRequest{Sandbox: b.id, ContainerId: b.id, Reference: ref, Class: b.node.arm.class(b.class)}); err != nil {
		return errgrpc.ToNative(err)
	}
	b.root = b.path("rootfs")
	_, err := b.guest.Mount(ctx, &api.MountRequest{Id: b.id, Reference: ref, Target: b.root, ReadOnly: true})
	b.there.Store(err == nil)
	return errgrpc.ToNative(err)
}

// pull prepares an image and mounts it.
func (b *sandbox) pull(ctx context.Context, ref string) error {
	if err := b.node.prepare(ctx, ref, b.class); err != nil {
		return err
	}
	return b.mount(ctx, ref)
}

// start pulls an image and reads files of it; it returns how long that took.
func (b *sandbox) start(tb testing.TB, image string, names []string) time.Duration {
	tb.Helper()
	began := time.Now()
	check(tb, b.pull(context.Background(), image))
	r := b.mustRead(tb, names)
	return time.Unix(0, r.Ended).Sub(began)
}

// mustRead has a program in the sandbox read files; none may fail.
func (b *sandbox) mustRead(tb testing.TB, names []string) readResult {
	tb.Helper()
	r, err := b.read(names)
	check(tb, err)
	if len(r.Errors) > 0 {
		tb.Fatalf("%s: %v", b.id, r.Errors)
	}
	return r
}

// files are paths in the container of files in its image.
func (b *sandbox) files(names []string) (all []string) {
	for _, n := range names {
		all = append(all, filepath.Join(b.root, n))
	}
	return all
}

// close unmounts the image and ends the sandbox.
func (b *sandbox) close() {
	if b.cmd == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	if b.client != nil {
		if _, err := b.guest.Unmount(ctx, &api.UnmountRequest{Id: b.id}); err != nil && b.root != "" {
			b.tb.Errorf("unmount %s: %v\n%s", b.id, err, b.log())
		}
		_ = b.client.Close() // there is nothing to lose
	}
	b.end()
	if b.node.client != nil {
		_, _ = b.node.api.Detach(ctx, &api.DetachRequest{Sandbox: b.id}) // the node may have been started anew
	}
}
