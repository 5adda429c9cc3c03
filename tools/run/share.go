package run

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
)

const shareProgram = "tatami-virtiofsd"

// shareStart bounds how long a tatami-virtiofsd may take until a VMM may connect.
const shareStart = 20 * time.Second

// shareReady is in the line that says so; it is the one that Kata waits for, too.
const shareReady = "Waiting for vhost-user socket connection"

// share is the tatami-virtiofsd of a machine: the node's image files as a file
// system of the guest.
type share struct {
	cmd    *exec.Cmd
	socket string // for the VMM
	log    shareLog
	ended  chan struct{}
	err    error // how the process ended; written before ended is closed
}

// imagesSocket is where the node gives images to tatami-virtiofsd.
func (o *Options) imagesSocket() string {
	if o.ImagesSocket != "" {
		return o.ImagesSocket
	}
	return filepath.Join(o.Root, "images.sock")
}

// findShare returns the program that shows the guest the node's images; "" when
// they come another way. The node must be running.
func findShare(o *Options) (string, error) {
	if o.Source != SourceVirtioFS && (o.Source != SourceAuto || o.Mode == Full) {
		return "", nil
	}
	bin, err := FindProgram(shareProgram)
	if err == nil {
		_, err = os.Stat(o.imagesSocket())
	}
	if err == nil {
		return bin, nil
	}
	err = fmt.Errorf("images over virtio-fs: %w", err)
	if o.Source == SourceVirtioFS {
		return "", fmt.Errorf("%w (tatami-host listens there; --source relay does without): %w", err, errdefs.ErrFailedPrecondition)
	}
	o.Log.Info("images come over the relay", "reason", err)
	return "", nil
}

// startShare starts a tatami-virtiofsd for the sandbox and waits until a VMM may
// connect; its socket is in dir, and so is its shared directory, which is empty.
func startShare(ctx context.Context, bin, dir, images, sandbox string) (*share, error) {
	s := &share{socket: filepath.Join(dir, "images"), ended: make(chan struct{}), log: shareLog{ready: make(chan struct{})}}
	files := filepath.Join(dir, "files")
	if err := os.Mkdir(files, 0o700); err != nil {
		return nil, fmt.Errorf("make the shared directory: %w", err)
	}
	// Not bound to ctx: close ends it, after the machine.
	s.cmd = exec.Command(bin, "--images", images, "--sandbox-id", sandbox, "--shared-dir", files, "--socket-path", s.socket) //nolint:noctx // close ends it
	s.cmd.Stdout, s.cmd.Stderr = &s.log, &s.log
	s.cmd.WaitDelay = shareEnd // its child may live on a little, with the same standard error
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := s.cmd.Start(); err != nil {
		return nil, fmt.Errorf("start %s: %w", bin, err)
	}
	go func() {
		if s.err = s.cmd.Wait(); errors.Is(s.err, exec.ErrWaitDelay) {
			s.err = nil // it has ended well
		}
		close(s.ended)
	}()
	if err := s.wait(ctx); err != nil {
		return nil, errors.Join(err, s.close(ctx))
	}
	return s, nil
}

func (s *share) wait(ctx context.Context) error {
	late := time.NewTimer(shareStart)
	defer late.Stop()
	select {
	case <-s.log.ready:
		return nil
	case <-s.ended:
		return s.reason()
	case <-late.C:
		return fmt.Errorf("tatami-virtiofsd is not ready after %v: %w\n%s", shareStart, errdefs.ErrUnavailable, s.log.String())
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}

// device is QEMU's end. The guest's init mounts the file system with this tag.
func (s *share) device() []string {
	return []string{"-chardev", "socket,id=images,path=" + s.socket, "-device", "vhost-user-fs-pci,chardev=images,tag=tatami"}
}

// reason says how the program ended. Precondition: it has.
func (s *share) reason() error {
	return fmt.Errorf("tatami-virtiofsd, which the guest reads its images from, has ended (%w): %w\n%s", orNil(s.err), errdefs.ErrUnavailable, s.log.String())
}

// close ends the program.
func (s *share) close(ctx context.Context) error {
	_ = s.cmd.Process.Signal(syscall.SIGTERM) // it may have ended with its VMM
	select {
	case <-s.ended:
		return nil
	case <-ctx.Done():
	case <-time.After(shareEnd):
	}
	_ = s.cmd.Process.Kill()
	<-s.ended
	return nil
}

// shareEnd is how long the program may take to end by itself.
const shareEnd = 5 * time.Second

// shareLog keeps the end of what the program writes, and closes ready at the line
// that says that it is.
type shareLog struct {
	tailBuffer
	ready chan struct{}
	once  sync.Once
}

func (l *shareLog) Write(p []byte) (int, error) {
	n, err := l.tailBuffer.Write(p)
	if bytes.Contains([]byte(l.String()), []byte(shareReady)) {
		l.once.Do(func() { close(l.ready) })
	}
	return n, err
}
