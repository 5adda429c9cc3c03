package virtiofsd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/tatami-containers/tatami/virtiofs/calls"
	"github.com/tatami-containers/tatami/virtiofs/confine"
	"golang.org/x/sys/unix"
)

// farewell is how long a child may take to end when its parent has said so.
const farewell = 5 * time.Second

// process is the child as its parent sees it.
type process struct {
	*calls.Conn
	cmd   *exec.Cmd
	done  chan struct{}   // closed when the process has ended
	files context.Context // of calls about files; ends when nothing is shown any more
}

// startChild starts a confined child: in the sandbox that was asked for, or in the
// strongest that is possible here. Its standard error is stderr.
func startChild(ctx context.Context, o *Options, handle calls.Handler, stderr io.Writer, log *slog.Logger) (*process, error) {
	tries := sandboxes(o)
	for {
		p, err := startConfined(ctx, o, tries[0], handle, stderr, log)
		if err == nil {
			return p, nil
		}
		if !errdefs.IsFailedPrecondition(err) {
			return nil, err
		}
		if tries = tries[1:]; len(tries) == 0 {
			return nil, fmt.Errorf("%w; give this process CAP_SYS_ADMIN or user namespaces, or choose another with --sandbox", err)
		}
		log.Warn("protection is weaker: no sandbox of that kind can be made here", "next", tries[0], "err", err)
	}
}

// sandboxes are those to try.
func sandboxes(o *Options) []confine.Sandbox {
	switch {
	case o.Sandbox != "":
		return []confine.Sandbox{o.Sandbox}
	case o.trees() != nil && os.Geteuid() == 0: // out of others root would find a way
		return []confine.Sandbox{confine.Namespace}
	case os.Geteuid() == 0:
		return []confine.Sandbox{confine.Namespace, confine.Chroot, confine.None}
	}
	return []confine.Sandbox{confine.Namespace, confine.None}
}

func startConfined(ctx context.Context, o *Options, s confine.Sandbox, handle calls.Handler, stderr io.Writer, log *slog.Logger) (*process, error) {
	args := confineArgs{Config: confine.Config{Sandbox: s, Nobody: os.Geteuid() == 0, Files: o.trees() != nil, Trap: o.Trap}, Debug: o.Debug, Trees: o.trees()}
	if s == confine.Chroot {
		dir, err := os.MkdirTemp("", "tatami-virtiofsd-")
		if err != nil {
			return nil, fmt.Errorf("make an empty directory: %w", err)
		}
		defer os.Remove(dir) //nolint:errcheck // it is empty; a root that was removed stays empty
		args.Empty = dir
	}
	p, err := start(s, handle, stderr)
	if err != nil {
		return nil, err
	}
	var got confined
	if _, err := p.Call(ctx, opConfine, args, &got); err != nil {
		return nil, errors.Join(p.why(err), p.kill())
	}
	log.Info("child is confined", "pid", p.cmd.Process.Pid, "sandbox", s)
	if len(got.Missing) > 0 {
		log.Warn("protection is weaker", "missing", strings.Join(got.Missing, "; "))
	}
	return p, nil
}

// start starts this program again, as a child.
func start(s confine.Sandbox, handle calls.Handler, stderr io.Writer) (*process, error) {
	if err := inheritNothing(); err != nil {
		return nil, err
	}
	ours, theirs, err := calls.Pair()
	if err != nil {
		return nil, err
	}
	defer theirs.Close()
	p := &process{cmd: exec.Command("/proc/self/exe"), done: make(chan struct{})} //nolint:noctx // stop and kill end it
	p.cmd.Args = []string{os.Args[0], childName}
	// Not that of the parent. Go's runtime keeps the limits of its control group open,
	// which root could open again for writing; the parent has read them.
	p.cmd.Env = []string{"GODEBUG=containermaxprocs=0", fmt.Sprintf("GOMAXPROCS=%d", runtime.GOMAXPROCS(0))}
	p.cmd.Stderr = stderr
	p.cmd.ExtraFiles = []*os.File{theirs} // parentFD
	p.cmd.SysProcAttr = confine.Attr(s)
	if err := p.run(); err != nil {
		if s == confine.Namespace && notPossible(err) {
			err = fmt.Errorf("sandbox %s: %w: %w", s, errdefs.ErrFailedPrecondition, err)
		}
		return nil, errors.Join(fmt.Errorf("start child: %w", err), ours.Close())
	}
	if p.Conn, err = calls.New(ours); err != nil {
		return nil, errors.Join(err, p.cmd.Process.Kill())
	}
	p.Start(handle)
	return p, nil
}

// inheritNothing keeps from the child what this process was started with: Go's own
// descriptors are not inherited anyway.
func inheritNothing() error {
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return fmt.Errorf("list open descriptors: %w", err)
	}
	for _, e := range fds {
		if fd, err := strconv.Atoi(e.Name()); err == nil && fd > 2 {
			unix.CloseOnExec(fd)
		}
	}
	return nil
}

// notPossible tells whether the kernel has no namespaces for us (clone(2)).
func notPossible(err error) bool {
	return slices.ContainsFunc([]error{unix.EPERM, unix.EACCES, unix.EINVAL, unix.ENOSPC, unix.ENOSYS, unix.EUSERS},
		func(e error) bool { return errors.Is(err, e) })
}

// run starts the process on a thread that lasts as long as it: with the thread that
// made it, a child with PR_SET_PDEATHSIG ends.
func (p *process) run() error {
	started := make(chan error, 1)
	go func() {
		defer close(p.done)
		runtime.LockOSThread() // the thread ends with this goroutine
		err := p.cmd.Start()
		started <- err
		if err == nil {
			_ = p.cmd.Wait() // ProcessState says all of it
		}
	}()
	return <-started
}

// add implements guest.
func (p *process) add(name string, node uint64, f *os.File) error {
	_, err := p.Call(p.files, opAdd, addArgs{name, node}, nil, f)
	return err
}

// remove implements guest.
func (p *process) remove(name string) error {
	_, err := p.Call(p.files, opRemove, fileArgs{name}, nil)
	return err
}

// errEnded is the reason when the process has ended.
var errEnded = errors.New("child has ended")

// why says how the process ended, if that is why a call failed.
func (p *process) why(err error) error {
	if !errors.Is(err, calls.ErrLost) {
		return err
	}
	// One that broke off the connection only ends here; one that ends already keeps
	// its status.
	if err := p.kill(); err != nil {
		return err
	}
	if ws, ok := p.cmd.ProcessState.Sys().(syscall.WaitStatus); ok && ws.Signal() == unix.SIGSYS {
		return fmt.Errorf("%w: it made a system call that is not on its list; --seccomp=trap shows where", errEnded)
	}
	return fmt.Errorf("%w: %s", errEnded, p.cmd.ProcessState)
}

// stop has the child end, by force if it does not in time.
func (p *process) stop() error {
	err := p.Close() // the child sees it
	select {
	case <-p.done:
		return err
	case <-time.After(farewell):
		return errors.Join(err, p.kill())
	}
}

func (p *process) kill() error {
	err := p.cmd.Process.Kill()
	if errors.Is(err, os.ErrProcessDone) {
		err = nil
	}
	<-p.done
	return errors.Join(err, p.Close())
}
