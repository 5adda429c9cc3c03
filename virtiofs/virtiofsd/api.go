package virtiofsd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/virtiofs/nydusapi"
)

// shower is the part of the program that has the guest.
type shower interface {
	// show mounts a directory of the node, which is open with O_PATH and stays the
	// caller's, in the tree of the guest.
	show(ctx context.Context, at string, k nydusapi.Kind, root *os.File) error
	hide(ctx context.Context, at string) error
}

// showTime bounds a mount; Kata waits for 30 s.
const showTime = 20 * time.Second

// requests are the mounts of the API: the part with the node's files. A path is the
// node's, from Kata, and followed as any other: what is in the directory is not looked
// at here.
type requests struct {
	passthrough bool
	from        *sources
	to          shower

	mu sync.Mutex // one at a time
}

var _ nydusapi.Mounts = (*requests)(nil)

// Mount implements nydusapi.Mounts. The configuration is that of another program.
func (r *requests) Mount(at string, k nydusapi.Kind, source, _ string) error {
	if k == nydusapi.Passthrough && !r.passthrough {
		return fmt.Errorf("%w: the virtual machine would be able to write to directories of the node; "+
			"if it shall, start tatami-virtiofsd with --passthrough (in Kata's configuration virtio_fs_extra_args = [\"--passthrough\"])",
			errdefs.ErrPermissionDenied)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	root, err := r.from.open(k, source)
	if err != nil {
		return err
	}
	defer root.Close()
	ctx, cancel := context.WithTimeout(context.Background(), showTime)
	defer cancel()
	if err := r.to.show(ctx, at, k, root); err != nil {
		return errors.Join(err, r.from.close(k))
	}
	return nil
}

// Unmount implements nydusapi.Mounts.
func (r *requests) Unmount(at string) error {
	r.mu.Lock()
	defer r.mu.Unlock()
	ctx, cancel := context.WithTimeout(context.Background(), showTime)
	defer cancel()
	if err := r.to.hide(ctx, at); err != nil {
		return err
	}
	if at == nydusapi.Containers {
		return r.from.close(nydusapi.Passthrough)
	}
	return nil
}

// serveAPI answers requests until ctx ends, which ended says. It listens when it
// returns.
func (p *parent) serveAPI(ctx context.Context) (ended <-chan error, err error) {
	l, err := listenAt(p.o.APISocket)
	if err != nil {
		return nil, err
	}
	srv := nydusapi.New(nydusapi.Config{ID: "tatami-virtiofsd", Log: p.log, Mounts: &requests{
		passthrough: p.o.Passthrough, from: p.sources(), to: p.child}})
	end := make(chan error, 1)
	go func() { end <- srv.Serve(ctx, l) }()
	return end, nil
}

// show implements shower: the child does it.
func (p *process) show(ctx context.Context, at string, k nydusapi.Kind, root *os.File) error {
	_, err := p.Call(ctx, opShow, showArgs{at, k}, nil, root)
	return err
}

// hide implements shower.
func (p *process) hide(ctx context.Context, at string) error {
	_, err := p.Call(ctx, opHide, showArgs{At: at}, nil)
	return err
}

// listenAt makes a socket for this user alone.
func listenAt(path string) (*net.UnixListener, error) {
	if err := removeStale(path); err != nil {
		return nil, err
	}
	// No time in which others could connect.
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("make socket %s: %w", path, err)
	}
	return l, nil
}
