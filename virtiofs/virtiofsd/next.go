package virtiofsd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/tatami-containers/tatami/virtiofs/calls"
	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
	"golang.org/x/sys/unix"
)

// A child that ends is followed by another, which takes up what the guest waits for:
// for the guest it is a pause. maxEnds in endsWithin are too many: then it is the
// guest or the VMM who ends them, and the next would fare no better.
const (
	maxEnds    = 5
	endsWithin = 20 * time.Second
)

// next is the Start of the Relay: the first time, it takes the child that waits.
func (p *parent) next(ctx context.Context) (*vhostuser.Backend, error) {
	for {
		if p.served != nil {
			if err := p.replace(ctx); err != nil {
				return nil, err
			}
		}
		b, err := p.serve(ctx)
		if !errors.Is(err, calls.ErrLost) {
			return b, err
		}
	}
}

// replace starts a child in place of one that is of no use any more.
func (p *parent) replace(ctx context.Context) error {
	select {
	case <-p.served:
	case <-time.After(farewell): // it hangs
	}
	why := p.child.why(calls.ErrLost)
	<-p.served
	if p.servedErr != nil && !errors.Is(p.servedErr, calls.ErrLost) {
		return p.servedErr // the VMM's fault: it broke the protocol
	}
	if !p.replaceable() {
		return why
	}
	for {
		if err := p.another(why); err != nil {
			return err
		}
		if why = p.start(ctx); !errors.Is(why, errEnded) {
			return why
		}
	}
}

// replaceable tells whether a child leaves nothing behind that only it knew, as the
// files of directories that its guest has open.
func (p *parent) replaceable() bool {
	_, all := p.hosted.names()
	return !p.o.Nydus && !p.o.Passthrough && all
}

// another tells whether there may be another child.
func (p *parent) another(why error) error {
	now := time.Now()
	p.ends = append(slices.DeleteFunc(p.ends, func(t time.Time) bool { return now.Sub(t) > endsWithin }), now)
	if len(p.ends) > maxEnds {
		return fmt.Errorf("%w: %d children have ended within %s: %w", errdefs.ErrUnavailable, len(p.ends), endsWithin, why)
	}
	p.log.Error("child has ended; another takes over", "err", why)
	return nil
}

// serve has the child serve a new connection.
func (p *parent) serve(ctx context.Context) (*vhostuser.Backend, error) {
	ours, theirs, err := connection()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	// Closed in any case, for replace.
	served := make(chan struct{})
	p.served = served
	if _, p.servedErr = p.child.Call(ctx, opConnect, nothing{}, nil, theirs); p.servedErr != nil {
		close(served)
		return nil, errors.Join(p.servedErr, ours.Close())
	}
	names, _ := p.hosted.names()
	p.mu.Lock()
	args := serveArgs{Tag: p.o.Tag, Cached: p.o.Cache == "always", Images: p.o.Images != "",
		Descriptors: descriptors(), Hosted: names, Session: p.session}
	p.mu.Unlock()
	child := p.child
	go func() {
		defer close(served)
		_, p.servedErr = child.Call(ctx, opServe, args, nil)
	}()
	return &vhostuser.Backend{Conn: ours, Ended: served}, nil
}

// connection is the two ends of one for vhost-user.
func connection() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make sockets: %w", err)
	}
	theirs = os.NewFile(uintptr(fds[1]), "vhost-user")
	ours, err = unixConn([]*os.File{os.NewFile(uintptr(fds[0]), "vhost-user")})
	if err != nil {
		return nil, nil, errors.Join(err, theirs.Close())
	}
	return ours, theirs, nil
}
