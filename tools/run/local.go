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

	"github.com/containerd/errdefs"
)

// local is a sandbox that is none: tatami-guest as a process on this machine,
// joined with the node by unix sockets.
type local struct {
	o     *Options
	dir   string
	cmd   *exec.Cmd
	log   tailBuffer
	ended chan struct{}
	err   error // how the process ended; written before ended is closed
}

func newLocal(o *Options, id string) (*local, error) {
	dir, err := os.MkdirTemp("", "tatami-"+id+"-")
	if err != nil {
		return nil, fmt.Errorf("make the sandbox's directory: %w", err)
	}
	return &local{o: o, dir: dir, ended: make(chan struct{})}, nil
}

func (l *local) addresses() addresses {
	at := func(name string) string { return "unix:" + filepath.Join(l.dir, name) }
	return addresses{guest: at("guest.sock"), streams: at("streams.sock"), host: at("host.sock"), relay: at("relay.sock"), registry: at("registry.sock")}
}

func (l *local) target() string {
	if l.o.Target != "" {
		return l.o.Target
	}
	return filepath.Join(l.dir, "rootfs")
}

func (l *local) start(context.Context) error {
	bin, err := FindProgram("tatami-guest")
	if err != nil {
		return err
	}
	a := l.addresses()
	args := []string{
		"--listen", a.guest, "--stream-listen", a.streams, "--cdh-socket", "",
		"--state-dir", filepath.Join(l.dir, "state"),
		"--mount-path", l.o.MountPath, "--store-dir", l.o.Keep, "--runner=true",
	}
	// Not bound to a context: close ends it, after everything is unmounted.
	l.cmd = exec.Command(bin, append(args, l.sourceArgs()...)...) //nolint:noctx // close stops it in order
	l.cmd.Stdout, l.cmd.Stderr = &l.log, &l.log
	l.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGTERM}
	if err := l.cmd.Start(); err != nil {
		return fmt.Errorf("start %s: %w", bin, err)
	}
	go func() {
		l.err = l.cmd.Wait()
		close(l.ended)
	}()
	return nil
}

// sourceArgs lets the guest reach the node, and the registry where it asks that
// itself.
func (l *local) sourceArgs() []string {
	a := l.addresses()
	args := []string{"--host-address", a.host, "--relay-address", a.relay}
	if l.o.Source == SourceRegistry {
		args = []string{"--host-address", "", "--relay-address", ""}
	}
	if !l.o.pulls() {
		return append(args, "--registry=false")
	}
	args = append(args, "--registry=true", "--registry-address", a.registry)
	for _, h := range l.o.PlainHTTP {
		args = append(args, "--plain-http", h)
	}
	return args
}

func (l *local) kind() string { return "" }

func (l *local) done() <-chan struct{} { return l.ended }

func (l *local) reason() error {
	return fmt.Errorf("tatami-guest: %w\n%s", orNil(l.err), l.log.String())
}

func (l *local) close(ctx context.Context) error {
	if l.cmd == nil || l.cmd.Process == nil {
		return os.RemoveAll(l.dir)
	}
	_ = l.cmd.Process.Signal(syscall.SIGTERM) // it may have ended by itself
	select {
	case <-l.ended:
		return l.remove()
	case <-ctx.Done():
	}
	_ = syscall.Kill(-l.cmd.Process.Pid, syscall.SIGKILL)
	<-l.ended
	return errors.Join(fmt.Errorf("tatami-guest did not end in time and was killed; look for mounts below %s: %w", l.dir, errdefs.ErrUnavailable), ctx.Err())
}

// remove removes the directory, unless something is mounted below it still:
// that may lead to the user's files.
func (l *local) remove() error {
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("look for mounts below %s: %w", l.dir, err)
	}
	if bytes.Contains(mounts, []byte(" "+l.dir+"/")) {
		return fmt.Errorf("tatami-guest ended badly (%w) and left mounts below %s: unmount them, then remove it", orNil(l.err), l.dir)
	}
	return os.RemoveAll(l.dir)
}

// tailBuffer keeps the last bytes that were written to it.
type tailBuffer struct {
	mu sync.Mutex
	b  []byte
}

const tailSize = 4 << 10

func (t *tailBuffer) Write(p []byte) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.b = append(t.b, p...)
	if n := len(t.b) - tailSize; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}

func (t *tailBuffer) String() string {
	t.mu.Lock()
	defer t.mu.Unlock()
	return string(bytes.TrimSpace(t.b))
}
