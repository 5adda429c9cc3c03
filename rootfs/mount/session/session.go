package session

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// ErrEnded says that the session is over: its filesystem was unmounted or its
// connection aborted. Nothing can be served on it again.
var ErrEnded = errors.New("FUSE session has ended")

// Mode is how requests survive the death of a worker; see the package comment.
type Mode string

// Modes. Auto takes Direct where the kernel can resend, else Journal.
const (
	Auto    Mode = ""
	Direct  Mode = "direct"
	Journal Mode = "journal"
)

// Config describes a session.
type Config struct {
	Dir  string // where the FUSE filesystem is mounted; made when missing
	Mode Mode
	Log  *slog.Logger // nil: silent
}

// Session is one mounted FUSE filesystem and the descriptor that keeps it. It
// belongs to the supervisor.
type Session struct {
	dir, id string
	mode    Mode
	offer   []byte   // the kernel's INIT request, verbatim
	fuse    *os.File // blocking, never read by the supervisor after INIT
	log     *slog.Logger

	workers int      // that it has had; of the supervisor
	pending [][]byte // requests that an earlier supervisor left unanswered (Journal)

	closed    atomic.Bool
	closeOnce sync.Once
	closeErr  error
}

// Open mounts a FUSE filesystem at cfg.Dir and settles the protocol. A dead
// mount that an earlier supervisor left at the directory is removed first.
// Errors name what is missing (/dev/fuse, the privilege to mount).
func Open(cfg Config) (*Session, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	dir, err := prepareDir(cfg.Dir)
	if err != nil {
		return nil, err
	}
	f, err := mountFuse(dir)
	if err != nil {
		return nil, err
	}
	s := &Session{dir: dir, id: rand.Text(), fuse: f, log: cfg.Log}
	if err := s.settle(cfg.Mode); err != nil {
		return nil, errors.Join(err, s.Close())
	}
	s.log.Info("FUSE session mounted", "dir", dir, "mode", s.mode)
	return s, nil
}

// prepareDir makes an absolute, empty mount point of dir.
func prepareDir(dir string) (string, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return "", fmt.Errorf("session directory: %w", err)
	}
	// A dead FUSE mount answers ENOTCONN to everything but umount.
	for unix.Unmount(dir, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return "", fmt.Errorf("make session directory: %w", err)
	}
	return dir, nil
}

func mountFuse(dir string) (*os.File, error) {
	fd, err := unix.Open("/dev/fuse", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open /dev/fuse: %w (the kernel needs FUSE: CONFIG_FUSE_FS or the module fuse)", err)
	}
	// No O_NONBLOCK: os.NewFile would register the descriptor with the poller
	// and every request of the kernel would wake the supervisor too.
	f := os.NewFile(uintptr(fd), "/dev/fuse")
	opts := fmt.Sprintf("fd=%d,rootmode=40555,user_id=0,group_id=0,allow_other,max_read=%d", fd, MaxRead)
	flags := uintptr(unix.MS_RDONLY | unix.MS_NODEV | unix.MS_NOSUID | unix.MS_NOEXEC)
	if err := unix.Mount("tatami", dir, "fuse.tatami", flags, opts); err != nil {
		return nil, errors.Join(fmt.Errorf("mount FUSE at %s: %w", dir, err), f.Close())
	}
	return f, nil
}

// settle answers the kernel's INIT, so that no worker ever sees one: a worker
// that died between reading INIT and answering it would hang the mount.
func (s *Session) settle(mode Mode) error {
	buf := make([]byte, BufferSize)
	n, err := readBlocking(s.fuse, buf)
	if err != nil {
		return fmt.Errorf("read INIT of session %s: %w", s.dir, err)
	}
	req, err := parseInit(buf[:n])
	if err != nil {
		return fmt.Errorf("start session %s: %w", s.dir, err)
	}
	if s.mode, err = chooseMode(mode, req.canResend()); err != nil {
		return err
	}
	s.offer = buf[:n:n]
	if _, err := s.fuse.Write(req.reply()); err != nil {
		return fmt.Errorf("answer INIT of session %s: %w", s.dir, err)
	}
	return nil
}

func chooseMode(want Mode, canResend bool) (Mode, error) {
	switch {
	case want == Journal || want == Auto && !canResend:
		return Journal, nil
	case want == Auto:
		return Direct, nil
	case want != Direct:
		return "", fmt.Errorf("session mode %q is neither %q nor %q: %w", want, Direct, Journal, errdefs.ErrInvalidArgument)
	case !canResend:
		return "", fmt.Errorf("session mode %q needs Linux 6.9 (FUSE_NOTIFY_RESEND): use %q: %w", Direct, Journal, errdefs.ErrFailedPrecondition)
	}
	return Direct, nil
}

// readBlocking reads one message and gives up after a while: INIT is queued
// before mount(2) returns, so in truth it is there at once.
func readBlocking(f *os.File, buf []byte) (int, error) {
	fds := []unix.PollFd{{Fd: int32(f.Fd()), Events: unix.POLLIN}}
	deadline := time.Now().Add(10 * time.Second)
	for {
		n, err := unix.Poll(fds, int(time.Until(deadline).Milliseconds()))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, err
		}
		if n == 0 || time.Now().After(deadline) {
			return 0, context.DeadlineExceeded
		}
		return f.Read(buf)
	}
}

// Dir is where the filesystem is mounted.
func (s *Session) Dir() string { return s.dir }

// Mode is Direct or Journal.
func (s *Session) Mode() Mode { return s.mode }

// Ended tells whether the session was closed here, or given up by the kernel.
func (s *Session) Ended() bool {
	if s.closed.Load() {
		return true
	}
	fds := []unix.PollFd{{Fd: int32(s.fuse.Fd())}}
	_, err := unix.Poll(fds, 0)
	return err == nil && fds[0].Revents&(unix.POLLERR|unix.POLLNVAL) != 0
}

// resend asks the kernel for every request that has no answer (Direct).
func (s *Session) resend() error {
	if _, err := s.fuse.Write(resendNotice()); err != nil {
		return fmt.Errorf("ask for unanswered requests of session %s: %w", s.dir, err)
	}
	return nil
}

// Close aborts the connection (readers that still wait get an error) and
// unmounts. What is mounted on the session's files must be gone before.
func (s *Session) Close() error {
	s.closeOnce.Do(func() {
		s.closed.Store(true)
		// MNT_FORCE aborts the FUSE connection even if the mount is busy.
		_ = unix.Unmount(s.dir, unix.MNT_FORCE)
		if err := unix.Unmount(s.dir, unix.MNT_DETACH); err != nil && err != unix.EINVAL && err != unix.ENOENT {
			s.closeErr = fmt.Errorf("unmount session %s: %w", s.dir, err)
		}
		s.closeErr = errors.Join(s.closeErr, s.fuse.Close())
	})
	return s.closeErr
}

// Attach returns the worker's end for use inside this process, once and instead
// of Supervise: for tests and for programs that need no restart. It reads
// /dev/fuse itself whatever the session's mode.
func (s *Session) Attach() (*Link, error) {
	fd, err := unix.FcntlInt(s.fuse.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate /dev/fuse: %w", err)
	}
	return newLink(handover{Dir: s.dir, ID: s.id, Mode: Direct, Offer: s.offer}, fd, -1)
}
