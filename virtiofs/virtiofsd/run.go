// Package virtiofsd is tatami-virtiofsd: one for each virtual machine, to which it
// shows the image files of one directory (package virtiofs), all of a directory
// (package passthrough), or what Kata mounts by requests (package nydusapi), and it
// ends with the VMM's connection. Usage and limits are in its help text.
//
// It is two processes, which call each other (package calls). The parent is the one
// that was started, and whose end the sandbox's owner sees. It opens files and
// sockets, hands them to its child, and passes on what the VMM says, which is
// trusted. The child touches the guest's memory and reads what guests write; it is
// confined (package confine) and opens nothing but what is in the directories that it
// was handed, above which there is nothing.
//
// A child that ends, by a fault or a signal, is followed by another one, which takes
// up the requests that have no answer: for the guest that is a pause. The parent
// keeps for it what the VMM has said (vhostuser.Relay), the INIT of the guest's
// session, and the names of files with the node ids that the guest knows. Children that end
// too often end the parent, and so does one that showed more than such files. The
// child ends with the parent, and the parent with the VMM's connection.
package virtiofsd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"log/syslog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/virtiofs"
	"github.com/tatami-containers/tatami/virtiofs/calls"
	"github.com/tatami-containers/tatami/virtiofs/nydusapi"
	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
	"golang.org/x/sys/unix"
)

// waiting is the line that Kata's runtime-rs waits for on standard error (its
// crates/resource/src/share_fs/share_virtio_fs_standalone.rs).
const waiting = "Waiting for vhost-user socket connection..."

// parent is the process that was started: it opens what its child serves, and sees
// no byte of the guest's.
type parent struct {
	o     *Options
	log   *slog.Logger
	out   io.Writer // where both processes log
	imgs  *images
	child *process

	// served is closed when the child serves no more, with the error in servedErr; nil
	// before it has begun.
	served    chan struct{}
	servedErr error
	ends      []time.Time // of children, the latest

	hosted hosted

	mu      sync.Mutex
	session session // of the guest

	// files ends when nothing is shown any more; cut ends it.
	files context.Context
	cut   context.CancelFunc
	dials chan struct{} // one element while there is a connection to be made for the child
}

func newParent(ctx context.Context, o *Options, out io.Writer, log *slog.Logger) *parent {
	p := &parent{o: o, out: out, log: log, dials: make(chan struct{}, 1)}
	p.files, p.cut = context.WithCancel(ctx)
	return p
}

// Run serves one VMM: it returns nil when that has left or ctx has ended. Lines that
// Kata reads go to stderr.
func Run(ctx context.Context, o *Options, stderr io.Writer) (err error) {
	out := logOutput(o, stderr)
	p := newParent(ctx, o, out, jsonLogger(out, o.Debug))
	defer p.cut()
	if len(o.Notes) > 0 {
		p.log.Info("options without effect here", "options", strings.Join(o.Notes, " "))
	}
	l, err := listen(o)
	if err != nil {
		return err
	}
	defer l.Close()
	if !o.Nydus && !o.Passthrough { // no image is what a guest can write
		if p.imgs, err = openImages(o.SharedDir, p.log); err != nil {
			return err
		}
		defer func() { err = errors.Join(err, p.imgs.close()) }()
	}
	if err := p.start(ctx); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.child.stop()) }()
	stop, err := p.present(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, stop()) }()
	fmt.Fprintln(stderr, waiting)
	vmm, err := p.accept(ctx, l)
	if ctx.Err() != nil {
		return nil
	}
	if err != nil {
		return p.child.why(err)
	}
	return p.relay(ctx, vmm)
}

// start starts a child that shows the files, if there are any.
func (p *parent) start(ctx context.Context) error {
	c, err := startChild(ctx, p.o, p.ops().Handle, p.out, p.log)
	if err != nil {
		return err
	}
	p.child, c.files = c, p.files
	if p.imgs == nil {
		return nil
	}
	return c.why(p.imgs.showTo(c))
}

// present gives the child the directories that shall be seen, and those of requests
// until stop.
func (p *parent) present(ctx context.Context) (stop func() error, err error) {
	if !p.o.Nydus {
		if p.o.Passthrough {
			err = p.pass(ctx)
		}
		return func() error { return nil }, err
	}
	ctx, cancel := context.WithCancel(ctx)
	ended, err := p.serveAPI(ctx)
	if err != nil {
		cancel()
		return nil, err
	}
	return func() error {
		cancel()
		return <-ended
	}, nil
}

// pass shows the shared directory itself.
func (p *parent) pass(ctx context.Context) error {
	from := p.sources()
	root, err := from.open(nydusapi.Passthrough, p.o.SharedDir)
	if err != nil {
		return err
	}
	defer root.Close()
	return p.child.show(ctx, "/", nydusapi.Passthrough, root)
}

func (p *parent) sources() *sources {
	return &sources{child: p.child, plain: os.Geteuid() != 0, log: p.log}
}

// follow keeps up with the shared directory, if there is one, until stop.
func (p *parent) follow() (stop func()) {
	if p.imgs == nil {
		return func() {}
	}
	var following sync.WaitGroup
	following.Go(p.imgs.follow)
	return func() {
		p.cut()                                           // the child may not answer
		_ = p.imgs.watch.SetReadDeadline(time.Unix(1, 0)) // ends follow
		following.Wait()
	}
}

// accept waits for the VMM, as long as the child is there.
func (p *parent) accept(ctx context.Context, l *net.UnixListener) (*net.UnixConn, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(p.child.Context(), cancel)
	defer stop()
	c, err := virtiofs.Accept(ctx, l)
	if err != nil && p.child.Context().Err() != nil {
		return nil, calls.ErrLost
	}
	return c, err
}

// relay has children serve the VMM, one after another if need be.
func (p *parent) relay(ctx context.Context, vmm *net.UnixConn) error {
	stop := p.follow()
	defer stop()
	r := vhostuser.Relay{Start: p.next, Queues: 1 + queues}
	return r.Run(ctx, vmm)
}

// ops are what the child may ask for. It is not trusted.
func (p *parent) ops() calls.Ops {
	return calls.Ops{
		opFind: calls.Op(0, func(_ context.Context, a fileArgs, _ []*os.File) (nothing, error) {
			if p.imgs != nil {
				p.imgs.find(a.Name)
			}
			return nothing{}, nil
		}),
		opNode: calls.Op(0, func(_ context.Context, a fileArgs, _ []*os.File) (uint64, error) { return p.hosted.node(a.Name) }),
		opBegan: calls.Op(0, func(_ context.Context, s session, _ []*os.File) (nothing, error) {
			p.mu.Lock()
			defer p.mu.Unlock()
			p.session = s
			return nothing{}, nil
		}),
		opDial: p.dial,
	}
}

// dialPause lies between two connections for a child, which could ask all the time.
const dialPause = 50 * time.Millisecond

// dial connects to tatami-host for the child, which cannot. It also says there
// which sandbox the connection is for, so that no child can say that.
func (p *parent) dial(ctx context.Context, _ string, _ json.RawMessage, files []*os.File) (any, []*os.File, error) {
	for _, f := range files {
		_ = f.Close() // none is wanted
	}
	if p.o.Images == "" {
		return nil, nil, fmt.Errorf("connect to tatami-host: %w: there is no --images", errdefs.ErrFailedPrecondition)
	}
	select {
	case p.dials <- struct{}{}:
		defer time.AfterFunc(dialPause, func() { <-p.dials })
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	c, err := sharedimages.Dial(ctx, p.o.Images, p.o.SandboxID)
	if err != nil {
		return nil, nil, fmt.Errorf("%w: %w", errdefs.ErrUnavailable, err)
	}
	f, err := c.File()
	if err = errors.Join(err, c.Close()); err != nil {
		return nil, nil, fmt.Errorf("connect to tatami-host: %w", err)
	}
	return nothing{}, []*os.File{f}, nil
}

// maxDescriptors are those for images of tatami-host: each may be a mapping, too, of
// which Linux allows a process about 65 thousand (vm.max_map_count).
const maxDescriptors = 16 << 10

// descriptors is how many of a process's are for images of tatami-host: half of them.
func descriptors() int64 {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return 0 // the default
	}
	return int64(min(l.Cur/2, maxDescriptors))
}

func listen(o *Options) (*net.UnixListener, error) {
	if o.FD >= 0 {
		return vhostuser.ListenerFromFD(o.FD)
	}
	return listenAt(o.SocketPath)
}

// removeStale removes what a process before has left.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) || err == nil && st.Mode().Type() != os.ModeSocket {
		return nil // listening reports what else is there
	}
	if err == nil {
		err = os.Remove(path)
	}
	if err != nil {
		return fmt.Errorf("remove old socket: %w", err)
	}
	return nil
}

// logOutput is where both processes log. The child could not reach the system's log
// by itself.
func logOutput(o *Options, stderr io.Writer) io.Writer {
	if !o.Syslog {
		return stderr
	}
	w, err := syslog.New(syslog.LOG_INFO|syslog.LOG_DAEMON, "tatami-virtiofsd")
	if err != nil {
		fmt.Fprintln(stderr, "tatami-virtiofsd: no syslog, logging here:", err)
		return stderr
	}
	return w
}

func jsonLogger(out io.Writer, debug bool) *slog.Logger {
	level := slog.LevelInfo
	if debug {
		level = slog.LevelDebug
	}
	return slog.New(slog.NewJSONHandler(out, &slog.HandlerOptions{Level: level}))
}
