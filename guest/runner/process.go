package runner

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// process is the runtime in the foreground; it ends when its container does.
type process struct {
	id, dir, runtime, root string

	cmd    *exec.Cmd
	notify *os.File      // inotify of dir
	up     chan struct{} // closed when first is known
	exited chan struct{} // closed when the runtime has ended
	first  *os.Process   // the container's first process; set before up is closed

	copies  sync.WaitGroup // of the three streams
	watcher sync.WaitGroup
	stdin   net.Conn
}

// startProcess runs the container with its streams on c's connections.
// Precondition: c.mu is held and c.conns are set.
func startProcess(c *container, runtime, root string) (*process, error) {
	p := &process{
		id: c.id, dir: c.dir, runtime: runtime, root: root, stdin: c.conns[stdin],
		up: make(chan struct{}), exited: make(chan struct{}),
	}
	var err error
	if p.notify, err = watchDir(c.dir); err != nil {
		return nil, err
	}
	var pipes pipes
	if err := pipes.open(); err != nil {
		return nil, errors.Join(err, p.notify.Close())
	}
	// Bound to no context: the container outlives the call that started it.
	p.cmd = exec.Command(runtime, "--root", root, "--log", p.path("log"), "--log-format", "json", //nolint:noctx // delete ends it
		"run", "--bundle", c.dir, "--pid-file", p.path("pid"), c.id)
	p.cmd.Stdin, p.cmd.Stdout, p.cmd.Stderr = pipes.theirs[stdin], pipes.theirs[stdout], pipes.theirs[stderr]
	if err := p.cmd.Start(); err != nil {
		pipes.close()
		return nil, errors.Join(fmt.Errorf("run %s: %w", runtime, err), p.notify.Close())
	}
	pipes.closeTheirs()
	p.copyStreams(c.conns, pipes.ours)
	p.watcher.Go(p.watch)
	return p, nil
}

func (p *process) path(name string) string { return filepath.Join(p.dir, name) }

func (p *process) copyStreams(conns [streamCount]net.Conn, ours [streamCount]*os.File) {
	p.copies.Go(func() {
		_, _ = io.Copy(ours[stdin], conns[stdin]) // the container need not read all of its input
		_ = ours[stdin].Close()                   // a pipe has nothing to flush
		_ = conns[stdin].Close()                  // the client shall not wait for a reader
	})
	for _, s := range []stream{stdout, stderr} {
		p.copies.Go(func() { _ = sendAll(conns[s], ours[s]) }) // a client that is gone knows it
	}
}

// wait returns the exit code when the runtime has ended and the output is sent.
func (p *process) wait() int32 {
	_ = p.cmd.Wait() // the state tells more
	close(p.exited)
	_ = p.stdin.Close()  // ends the copy of what nobody will read
	_ = p.notify.Close() // ends the watcher
	p.watcher.Wait()
	p.copies.Wait()
	if status, ok := p.cmd.ProcessState.Sys().(unix.WaitStatus); ok && status.Signaled() {
		return 128 + int32(status.Signal())
	}
	return int32(p.cmd.ProcessState.ExitCode())
}

// started waits for the container's first process.
func (p *process) started(ctx context.Context) (int, error) {
	select {
	case <-p.up:
		return p.first.Pid, nil
	case <-ctx.Done():
		return 0, context.Cause(ctx)
	case <-p.exited:
	}
	p.watcher.Wait() // which looks once more for the pid of a short process
	select {
	case <-p.up:
		return p.first.Pid, nil
	default:
		return 0, fmt.Errorf("%s: %s: %w", filepath.Base(p.runtime), p.lastError(), errdefs.ErrFailedPrecondition)
	}
}

// lastError is the last message in the runtime's log.
func (p *process) lastError() string {
	b, err := os.ReadFile(p.path("log"))
	if err != nil {
		return err.Error()
	}
	lines := bytes.Split(bytes.TrimSpace(b), []byte("\n"))
	var entry struct{ Msg string }
	if err := json.Unmarshal(lines[len(lines)-1], &entry); err != nil || entry.Msg == "" {
		return fmt.Sprintf("it ended with %v and said nothing", p.cmd.ProcessState)
	}
	return entry.Msg
}

func (p *process) signal(s unix.Signal) error {
	var target *os.Process
	select {
	case <-p.up:
		target = p.first
	default:
		if s != unix.SIGKILL {
			return fmt.Errorf("it is just being started: try again: %w", errdefs.ErrUnavailable)
		}
		target = p.cmd.Process
	}
	err := target.Signal(s)
	if errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("it has ended: %w", errdefs.ErrNotFound)
	}
	if errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("signal %d: %w", s, errdefs.ErrInvalidArgument)
	}
	return err
}

// cleanUp removes what the runtime keeps of a container when it was killed
// itself. In the ordinary case there is nothing.
func (p *process) cleanUp(ctx context.Context) error {
	if _, err := os.Stat(filepath.Join(p.root, p.id)); err != nil {
		return nil
	}
	out, err := exec.CommandContext(ctx, p.runtime, "--root", p.root, "delete", "--force", p.id).CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s delete: %w: %s", filepath.Base(p.runtime), err, bytes.TrimSpace(out))
	}
	return nil
}

// watchDir watches for files that become complete in dir.
func watchDir(dir string) (*os.File, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch %s: %w", dir, err)
	}
	f := os.NewFile(uintptr(fd), "inotify")
	// crun writes the file in place, runc renames it.
	if _, err := unix.InotifyAddWatch(fd, dir, unix.IN_CLOSE_WRITE|unix.IN_MOVED_TO); err != nil {
		return nil, errors.Join(fmt.Errorf("watch %s: %w", dir, err), f.Close())
	}
	return f, nil
}

// watch waits for the pid file. It ends when the process is up or has ended.
func (p *process) watch() {
	for buf := make([]byte, 4096); !p.readPID(); {
		if _, err := p.notify.Read(buf); err != nil {
			p.readPID() // a short process has been and gone
			return
		}
	}
}

// readPID tells whether the container is up.
func (p *process) readPID() bool {
	b, err := os.ReadFile(p.path("pid"))
	if err != nil {
		return false
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 0 {
		return false
	}
	// A handle on the process (a pidfd): its number may soon be another's.
	if p.first, err = os.FindProcess(pid); err != nil {
		return false
	}
	close(p.up)
	return true
}

// pipes are between the container and us.
type pipes struct{ ours, theirs [streamCount]*os.File }

func (p *pipes) open() error {
	for s := range streamCount {
		r, w, err := os.Pipe()
		if err != nil {
			p.close()
			return fmt.Errorf("make a pipe: %w", err)
		}
		p.ours[s], p.theirs[s] = r, w
		if s == stdin {
			p.ours[s], p.theirs[s] = w, r
		}
	}
	return nil
}

func (p *pipes) closeTheirs() {
	for _, f := range p.theirs {
		if f != nil {
			_ = f.Close() // a pipe has nothing to flush
		}
	}
}

func (p *pipes) close() {
	p.closeTheirs()
	for _, f := range p.ours {
		if f != nil {
			_ = f.Close() // a pipe has nothing to flush
		}
	}
}
