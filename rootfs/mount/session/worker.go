package session

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// stuckAfter is how long a killed worker may take to disappear before the next
// one is started regardless. A thread that waits for a FUSE answer cannot die,
// and only the next worker can give that answer.
const stuckAfter = 200 * time.Millisecond

// worker is one running (or dead) worker process.
type worker struct {
	cmd    *exec.Cmd
	gone   chan struct{} // closed when it will do nothing any more
	reaped chan struct{} // closed when the process has disappeared
}

func (w *worker) pid() int { return w.cmd.Process.Pid }

// signal may find the process gone, which its watcher learns by itself.
func (w *worker) signal(sig syscall.Signal) { _ = w.cmd.Process.Signal(sig) }

func (w *worker) state() string {
	select {
	case <-w.reaped:
		return w.cmd.ProcessState.String()
	default:
		return "killed, still waiting in the kernel"
	}
}

// start launches the next worker and hands the session over to it.
func (s *supervisor) start() (*worker, error) {
	if s.Session.workers > 0 && s.journal == nil {
		if err := s.Session.resend(); err != nil {
			return nil, err
		}
	}
	life, lifeChild, err := socketPair()
	if err != nil {
		return nil, err
	}
	files := []*os.File{s.Session.fuse, lifeChild}
	var link *os.File
	if s.journal != nil {
		var child *os.File
		if link, child, err = socketPair(); err != nil {
			return nil, errors.Join(err, life.Close(), lifeChild.Close())
		}
		files = append(files, child)
	}
	cmd, err := s.command(files)
	if err == nil {
		err = cmd.Start()
	}
	for _, f := range files[1:] { // the worker has its own; ours would hide its end
		_ = f.Close()
	}
	if err != nil {
		if link != nil {
			_ = link.Close()
		}
		return nil, errors.Join(fmt.Errorf("start worker %s: %w", s.Command[0], err), life.Close())
	}
	if link != nil {
		s.journal.attach(link)
	}
	s.Log.Info("worker started", "pid", cmd.Process.Pid, "restarts", s.Session.workers, "mode", s.Session.mode)
	return s.watchProcess(cmd, life), nil
}

func (s *supervisor) command(files []*os.File) (*exec.Cmd, error) {
	h := handover{Dir: s.Session.dir, ID: s.Session.id, Mode: s.Session.mode, Offer: s.Session.offer, Restarts: s.Session.workers}
	for _, f := range s.ExtraFiles {
		h.Extra = append(h.Extra, f.Name())
	}
	v, err := json.Marshal(h)
	if err != nil {
		return nil, err
	}
	// No context: Supervise ends the process itself, first politely.
	cmd := exec.Command(s.Command[0], s.Command[1:]...) //nolint:noctx // see above
	cmd.Env = s.Env
	if cmd.Env == nil {
		cmd.Env = os.Environ()
	}
	cmd.Env = append(cmd.Env, handoverEnv+"="+string(v))
	cmd.ExtraFiles = append(files, s.ExtraFiles...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if s.Stdout != nil {
		cmd.Stdout = s.Stdout
	}
	if s.Stderr != nil {
		cmd.Stderr = s.Stderr
	}
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	return cmd, nil
}

// watchProcess follows a process by two signs: being reaped, and the closing
// of its lifeline, which a thread stuck in the kernel cannot delay.
func (s *supervisor) watchProcess(cmd *exec.Cmd, life *os.File) *worker {
	w := &worker{cmd: cmd, gone: make(chan struct{}), reaped: make(chan struct{})}
	s.processes.Go(func() {
		_ = cmd.Wait() // the state says how it ended
		close(w.reaped)
		_ = life.Close() // ends the read below
	})
	s.processes.Go(func() {
		defer close(w.gone)
		var b [1]byte
		_, _ = life.Read(b[:])
		stuck := time.NewTimer(stuckAfter)
		defer stuck.Stop()
		select {
		case <-w.reaped:
		case <-stuck.C:
		}
	})
	return w
}

// socketPair makes two connected, message-preserving sockets: ours, in the
// poller, and the worker's.
func socketPair() (ours, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("make socket pair: %w", err)
	}
	if err := unix.SetNonblock(fds[0], true); err != nil {
		return nil, nil, errors.Join(err, unix.Close(fds[0]), unix.Close(fds[1]))
	}
	return os.NewFile(uintptr(fds[0]), "supervisor end"), os.NewFile(uintptr(fds[1]), "worker end"), nil
}
