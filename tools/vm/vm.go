// Package vm runs small Linux guests under QEMU, for development and tests: a
// kernel, an initramfs, a serial console, vsock, if wanted a network card.
//
// A machine never outlives the process that started it: the kernel kills QEMU when
// the process dies, and Close ends it in bounded time.
package vm

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/virtiofs/vhostvsock"
	"golang.org/x/sys/unix"
)

// Names in a machine's private directory.
const (
	vmmSocket  = "vmm"  // QEMU's side of our vsock device
	hostSocket = "host" // the hybrid socket
)

const (
	vhostDevice = "/dev/vhost-vsock"
	// termWait is how long QEMU may take to end by itself; it can hang in a
	// vhost-user device's stop.
	termWait = 3 * time.Second
)

// VM is a running machine.
type VM struct {
	cfg     Config
	accel   Accel
	vsock   Vsock
	dir     string
	console console
	stderr  console
	pid     int
	asked   atomic.Bool // Close or Kill ended it

	stopVsock context.CancelFunc // nil with the kernel's vsock
	vsockDone chan struct{}
	exited    chan struct{} // QEMU has ended; exitErr is set
	exitErr   error
	done      chan struct{} // everything has ended; err is set
	err       error
}

// Start starts a machine. It returns when QEMU runs, not when the guest is ready:
// see WaitReady. ctx is for starting alone; Close must follow.
func Start(ctx context.Context, cfg Config) (*VM, error) {
	v := &VM{vsockDone: make(chan struct{}), exited: make(chan struct{}), done: make(chan struct{})}
	if err := v.start(ctx, cfg); err != nil {
		return nil, fmt.Errorf("start virtual machine: %w", err)
	}
	return v, nil
}

func (v *VM) start(ctx context.Context, cfg Config) (err error) {
	if err := cfg.complete(); err != nil {
		return err
	}
	if cfg.QEMU, err = exec.LookPath(cfg.QEMU); err != nil {
		return fmt.Errorf("%w: install QEMU (Debian: qemu-system-x86): %w", errdefs.ErrFailedPrecondition, err)
	}
	v.accel, err = chooseAccel(ctx, cfg)
	if err != nil {
		return err
	}
	v.vsock = chooseVsock(cfg.Vsock)
	if cfg.CID == 0 {
		cfg.CID = chooseCID(v.vsock)
	}
	v.cfg, v.console.copy = cfg, cfg.Console
	if v.dir, err = os.MkdirTemp(cfg.Dir, "vm-"); err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, v.release())
		}
	}()
	if err := v.startVsock(); err != nil {
		return err
	}
	if err := v.startQEMU(); err != nil {
		return err
	}
	go v.wait()
	return nil
}

func chooseAccel(ctx context.Context, cfg Config) (Accel, error) {
	if cfg.Accel != AccelAuto {
		return cfg.Accel, nil
	}
	good, reason, err := ProbeKVM(ctx, cfg.QEMU, cfg.Kernel)
	if err != nil {
		return "", err
	}
	if good {
		return AccelKVM, nil
	}
	cfg.Log.Info("virtual machine without KVM", "reason", reason)
	return AccelTCG, nil
}

func chooseVsock(want Vsock) Vsock {
	if want != VsockAuto {
		return want
	}
	f, err := os.OpenFile(vhostDevice, os.O_RDWR, 0)
	if err != nil {
		return VsockVhostUser
	}
	_ = f.Close() // opened only to see that it can be
	return VsockVhost
}

// chooseCID: the kernel's are shared by all guests of the node, and a collision of
// two random ones is QEMU's error; ours belong to the machine alone.
func chooseCID(v Vsock) uint32 {
	if v == VsockVhost {
		return 3 + rand.Uint32N(1<<31)
	}
	return 3
}

// release gives back what belongs to a machine without QEMU.
func (v *VM) release() error {
	if v.stopVsock != nil {
		v.stopVsock()
		<-v.vsockDone
	}
	return os.RemoveAll(v.dir)
}

func (v *VM) startVsock() error {
	if v.vsock != VsockVhostUser {
		return nil
	}
	srv, err := vhostvsock.Listen(vhostvsock.Config{CID: v.cfg.CID, Path: v.hybridPath(), Log: v.cfg.Log},
		filepath.Join(v.dir, vmmSocket))
	if err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	v.stopVsock = cancel
	go func() {
		defer close(v.vsockDone)
		if err := srv.Serve(ctx); err != nil {
			v.cfg.Log.Error("vsock device of the virtual machine", "err", err)
		}
	}()
	return nil
}

// startQEMU starts QEMU from a thread that lives as long as QEMU does: Pdeathsig
// fires when the thread that forked ends (prctl(2), PR_SET_PDEATHSIG).
func (v *VM) startQEMU() error {
	cmd := exec.Command(v.cfg.QEMU, v.cfg.args(v.accel, v.vsock, v.dir)...) //nolint:noctx // Close and Kill end it
	cmd.Stdout, cmd.Stderr = &v.console, &v.stderr
	// A group of its own: a terminal's interrupt is for us to handle.
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	v.cfg.Log.Debug("start QEMU", "args", cmd.Args)
	started := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		if err == nil {
			v.pid = cmd.Process.Pid
		}
		started <- err
		if err == nil {
			v.exitErr = cmd.Wait()
			close(v.exited)
		}
	}()
	return <-started
}

// wait finishes the machine when QEMU has ended.
func (v *VM) wait() {
	<-v.exited
	err := v.release()
	if v.exitErr != nil && !v.asked.Load() {
		err = errors.Join(fmt.Errorf("QEMU: %w: %s", v.exitErr, lastLines(v.stderr.String(), 5)), err)
	}
	v.err = err
	close(v.done)
}

func (v *VM) hybridPath() string { return filepath.Join(v.dir, hostSocket) }

// GuestAddress is where a port of the guest is reached, for vsock.Dial.
func (v *VM) GuestAddress(port uint32) string {
	a := vsock.Address{Network: vsock.Hybrid, Path: v.hybridPath(), Port: port}
	if v.vsock == VsockVhost {
		a = vsock.Address{Network: vsock.VSock, CID: v.cfg.CID, HasCID: true, Port: port}
	}
	return a.String()
}

// HostAddress is where a service for the guest listens, for vsock.Listen. The
// guest finds it at CID 2 and port. With the kernel's vsock, other guests find it
// as well: compare vsock.PeerCID with CID.
func (v *VM) HostAddress(port uint32) string {
	a := vsock.Address{Network: vsock.Hybrid, Path: v.hybridPath(), Port: port}
	if v.vsock == VsockVhost {
		a = vsock.Address{Network: vsock.VSock, Port: port}
	}
	return a.String()
}

// CID is the guest's context ID.
func (v *VM) CID() uint32 { return v.cfg.CID }

// PID is QEMU's process.
func (v *VM) PID() int { return v.pid }

// Accel is what runs the guest: AccelKVM or AccelTCG.
func (v *VM) Accel() Accel { return v.accel }

// Done is closed when the machine has ended and is cleaned up.
func (v *VM) Done() <-chan struct{} { return v.done }

// Err is why QEMU ended; nil while it runs and when it ended well, as after the
// guest's power off.
func (v *VM) Err() error {
	select {
	case <-v.done:
		return v.err
	default:
		return nil
	}
}

// Console is the end of the serial console, at most 64 KiB.
func (v *VM) Console() string { return v.console.String() }

// WaitReady calls ready until it returns nil. The error is ErrUnavailable when the
// machine ended before, or that of the last try when ctx did; both with the end of
// the console.
func (v *VM) WaitReady(ctx context.Context, ready func(context.Context) error) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	t := time.NewTicker(20 * time.Millisecond)
	defer t.Stop()
	last := errors.New("not tried")
	for {
		select {
		case <-v.done:
			return fmt.Errorf("virtual machine ended before it was ready: %w: %w; check that the kernel fits the machine and has "+
				"enough memory; the console ends with:\n%s", errdefs.ErrUnavailable, errors.Join(v.err, last), lastLines(v.Console(), 25))
		case <-ctx.Done():
			return fmt.Errorf("wait for the virtual machine: %w: %w; the console ends with:\n%s",
				context.Cause(ctx), last, lastLines(v.Console(), 25))
		case <-t.C:
		}
		if last = v.try(ctx, ready); last == nil {
			return nil
		}
	}
}

// try calls ready with a context that ends when the machine does.
func (v *VM) try(ctx context.Context, ready func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	tried := make(chan struct{})
	defer close(tried)
	go func() {
		select {
		case <-v.done:
			cancel()
		case <-tried:
		}
	}()
	return ready(ctx)
}

// Kill ends the machine as a power failure does, and waits for its end. The error
// is that of cleaning up.
func (v *VM) Kill() error {
	v.signal(unix.SIGKILL)
	<-v.done
	return v.err
}

// Close ends the machine, in a few seconds at most. It may be called again, and
// after the machine has ended; the error is that of an end that nobody asked for.
func (v *VM) Close() error {
	v.signal(unix.SIGTERM)
	t := time.NewTimer(termWait)
	defer t.Stop()
	select {
	case <-v.done:
	case <-t.C:
		return v.Kill()
	}
	return v.err
}

// signal reaches QEMU and what it may have started.
func (v *VM) signal(s unix.Signal) {
	select {
	case <-v.exited: // the number may belong to somebody else
	default:
		v.asked.Store(true)
		_ = unix.Kill(-v.pid, s) // ESRCH: it has just ended
	}
}
