package virtiofsd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/tatami-containers/tatami/virtiofs"
	"github.com/tatami-containers/tatami/virtiofs/calls"
	"github.com/tatami-containers/tatami/virtiofs/confine"
	"github.com/tatami-containers/tatami/virtiofs/hostimages"
	"github.com/tatami-containers/tatami/virtiofs/nydusapi"
)

// What the two processes ask of each other. Of the child:
const (
	opConfine = "confine" // confineArgs -> confined
	opAdd     = "add"     // addArgs, the file -> nothing
	opRemove  = "remove"  // fileArgs -> nothing
	opConnect = "connect" // the VMM's connection -> nothing
	opServe   = "serve"   // serveArgs -> nothing, when the VMM has left
	opShow    = "show"    // showArgs, the directory -> nothing
	opHide    = "hide"    // showArgs -> nothing
)

// And of the parent:
const (
	opFind  = "find"  // fileArgs -> nothing; it may have added the file before it answers
	opDial  = "dial"  // nothing -> a connection to tatami-host
	opBegan = "began" // session -> nothing
	opNode  = "node"  // fileArgs, of an image of tatami-host -> its node id
)

type confineArgs struct {
	confine.Config
	Debug bool
	// Trees says how to show directories, where the child is to (Config.Files).
	Trees *treeOptions
}

type confined struct{ Missing []string }

type fileArgs struct{ Name string }

type addArgs struct {
	Name string
	Node uint64
}

type showArgs struct {
	At   string
	Kind nydusapi.Kind
}

type serveArgs struct {
	Tag    string
	Cached bool
	// Images says that the parent can connect to tatami-host (opDial).
	Images bool
	// Descriptors is how many its images may take.
	Descriptors int64
	Hosted      []string // images that a child before this one showed
	Session     session
}

// session is the INIT of the guest's session; see virtiofs.Config.
type session []byte

type nothing struct{}

// queues is how many request queues a VMM may use.
const queues = 16

const (
	childName = "child" // the only argument of a child
	parentFD  = 3       // its end of the connection
)

// IsChild tells whether this process is the child of another one.
func IsChild(args []string) bool { return len(args) == 2 && args[1] == childName }

// child is the process that has the guest. Everything comes from its parent: it
// opens nothing.
type child struct {
	parent *calls.Conn
	dir    *virtiofs.Directory
	trees  *trees // nil where images are all that is shown
	stderr io.Writer
	log    *slog.Logger // once it is confined

	hosted atomic.Pointer[hostimages.Client] // images of tatami-host; nil without

	mu    sync.Mutex
	files map[string]*os.File // that were added
	vmm   *net.UnixConn
}

// RunChild serves the parent until that has gone.
func RunChild(stderr io.Writer) error {
	signal.Ignore(os.Interrupt, syscall.SIGTERM, syscall.SIGHUP) // the parent says when to end
	c, err := newChild(os.NewFile(parentFD, "parent"), stderr)
	if err != nil {
		return fmt.Errorf("child: %w", err)
	}
	<-c.parent.Context().Done()
	return c.parent.Close()
}

func newChild(parent *os.File, stderr io.Writer) (*child, error) {
	conn, err := calls.New(parent)
	if err != nil {
		return nil, err
	}
	c := &child{parent: conn, dir: virtiofs.NewDirectory(), stderr: stderr, log: slog.New(slog.DiscardHandler),
		files: map[string]*os.File{}}
	c.dir.Find = c.find
	conn.Start(calls.Ops{
		opConfine: calls.Op(0, c.confine),
		opAdd:     calls.Op(1, c.add),
		opRemove:  calls.Op(0, c.remove),
		opConnect: calls.Op(1, c.connect),
		opServe:   calls.Op(0, c.serve),
		opShow:    calls.Op(1, c.show),
		opHide:    calls.Op(0, c.hide),
	}.Handle)
	return c, nil
}

// confine is the first call. The process is of no use when it fails.
func (c *child) confine(_ context.Context, a confineArgs, _ []*os.File) (confined, error) {
	c.log = jsonLogger(c.stderr, a.Debug)
	_ = time.Now().String() // what opens the file of the time zone, once
	if a.Trees != nil {
		var err error
		if c.trees, err = newTrees(*a.Trees, c.dir, c.log); err != nil {
			return confined{}, err
		}
	}
	missing, err := confine.Enter(a.Config)
	return confined{missing}, err
}

func (c *child) show(ctx context.Context, a showArgs, files []*os.File) (nothing, error) {
	defer files[0].Close()
	if c.trees == nil {
		return nothing{}, fmt.Errorf("show %s: %w: only images are shown", a.At, errdefs.ErrFailedPrecondition)
	}
	return nothing{}, c.trees.show(ctx, a.At, a.Kind, files[0])
}

func (c *child) hide(ctx context.Context, a showArgs, _ []*os.File) (nothing, error) {
	if c.trees == nil {
		return nothing{}, fmt.Errorf("hide %s: %w", a.At, errdefs.ErrNotFound)
	}
	return nothing{}, c.trees.hide(ctx, a.At)
}

func (c *child) add(_ context.Context, a addArgs, files []*os.File) (nothing, error) {
	f, err := newImage(files[0])
	if err == nil {
		err = c.dir.AddAs(a.Node, a.Name, f)
	}
	if err != nil {
		return nothing{}, errors.Join(err, files[0].Close())
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.files[a.Name] = files[0]
	return nothing{}, nil
}

func (c *child) remove(_ context.Context, a fileArgs, _ []*os.File) (nothing, error) {
	c.mu.Lock()
	f := c.files[a.Name]
	delete(c.files, a.Name)
	c.mu.Unlock()
	if f == nil {
		return nothing{}, fmt.Errorf("remove file %q: %w", a.Name, errdefs.ErrNotFound)
	}
	c.dir.Remove(a.Name)
	return nothing{}, f.Close()
}

// find implements virtiofs.Directory.Find. That the parent has no such file is no
// error.
func (c *child) find(name string) {
	if h := c.hosted.Load(); h != nil && h.Find(name) {
		return
	}
	if _, err := c.parent.Call(context.Background(), opFind, fileArgs{name}, nil); err != nil {
		c.log.Warn("look for file", "file", name, "err", err)
	}
}

// began tells of a session, for a process after this one.
func (c *child) began(init []byte) {
	if _, err := c.parent.Call(context.Background(), opBegan, session(init), nil); err != nil {
		c.log.Warn("remember session", "err", err)
	}
}

// dial makes a new connection to tatami-host.
func (c *child) dial(ctx context.Context) (*net.UnixConn, error) {
	files, err := c.parent.Call(ctx, opDial, nothing{}, nil)
	if err != nil {
		return nil, err
	}
	return unixConn(files)
}

// unixConn makes a connection of the one descriptor.
func unixConn(files []*os.File) (*net.UnixConn, error) {
	if len(files) != 1 {
		for _, f := range files {
			_ = f.Close() // not what was asked for
		}
		return nil, fmt.Errorf("%d descriptors instead of one", len(files))
	}
	nc, err := net.FileConn(files[0])
	if err = errors.Join(err, files[0].Close()); err != nil {
		return nil, fmt.Errorf("use received socket: %w", err)
	}
	c, ok := nc.(*net.UnixConn)
	if !ok {
		return nil, errors.Join(errors.New("use received socket: not a unix socket"), nc.Close())
	}
	return c, nil
}

func (c *child) connect(_ context.Context, _ nothing, files []*os.File) (nothing, error) {
	vmm, err := unixConn(files)
	if err != nil {
		return nothing{}, err
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.vmm != nil {
		return nothing{}, errors.Join(fmt.Errorf("connection of the VMM: %w", errdefs.ErrAlreadyExists), vmm.Close())
	}
	c.vmm = vmm
	return nothing{}, nil
}

// serve serves the VMM until it has left or the parent has gone.
func (c *child) serve(ctx context.Context, a serveArgs, _ []*os.File) (nothing, error) {
	cfg := virtiofs.Config{Directory: c.dir, Queues: queues, Tag: a.Tag, Began: c.began, Session: a.Session, Log: c.log}
	c.dir.Cached = a.Cached
	if c.trees != nil {
		cfg.Directory = nil
		c.trees.configure(&cfg)
	}
	srv, err := virtiofs.New(cfg)
	if err != nil {
		return nothing{}, err
	}
	c.mu.Lock()
	vmm := c.vmm
	c.mu.Unlock()
	if vmm == nil {
		return nothing{}, fmt.Errorf("serve: %w: no connection of a VMM", errdefs.ErrFailedPrecondition)
	}
	c.log.Info("VMM is connected")
	if a.Images {
		defer c.host(ctx, a.Descriptors, a.Hosted)()
	}
	err = srv.Serve(ctx, vmm)
	c.log.Info("VMM has left", "stats", srv.Stats())
	return nothing{}, err
}
