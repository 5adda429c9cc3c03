// Package vmtest boots virtual machines for tests: a kernel of this machine, an
// initramfs with one of our programs as init, QEMU with KVM where that works and
// emulation where it does not (two to three seconds to boot).
//
// Environment: TATAMI_VM_KERNEL names the kernel image (else package tools/vm
// finds one), TATAMI_VM_ACCEL is "kvm" or "tcg", TATAMI_VM_CONSOLE=1 copies the
// guest's console to standard error.
package vmtest

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
	imageservice "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/tools/vm"
)

// GuestInit is the package of the daemon in the guest, which is also an init.
const GuestInit = "github.com/tatami-containers/tatami/guest/cmd/tatami-guest"

// bootWait is for the slowest of shared machines; a guest is ready after seconds.
const bootWait = 2 * time.Minute

// Options say what kind of guest is wanted; the zero value is good.
type Options struct {
	Init            string // package of the init; GuestInit when empty
	MemoryMiB, CPUs int
	Cmdline         string            // added to the kernel's
	Network         bool              // a card that reaches the node's network
	Reboot          bool              // the guest may boot again
	Modules         []string          // more kernel modules
	OptionalModules []string          // more of those that only some kernels have
	Binaries        []string          // more programs of this machine, beside crun, runc, busybox
	Files           map[string][]byte // files by their path in the guest
	Args            []string          // more arguments for QEMU
	Vsock           vm.Vsock
	Dir             string // where the machine's sockets are; the system's for temporary files when empty
}

// Need skips the test with the reason when virtual machines cannot run here.
func Need(t testing.TB) {
	t.Helper()
	if testing.Short() {
		t.Skip("needs a virtual machine: -short is set")
	}
	if _, err := exec.LookPath("qemu-system-x86_64"); err != nil {
		t.Skip("needs a virtual machine: install qemu-system-x86")
	}
	if _, err := kernel(); err != nil {
		t.Skipf("needs a virtual machine: %v", err)
	}
}

func kernel() (vm.Kernel, error) { return vm.FindKernel(os.Getenv("TATAMI_VM_KERNEL")) }

// Start boots a guest and does not wait for it. The machine ends with the test; a
// failed test shows the console.
func Start(t testing.TB, o Options) *vm.VM {
	t.Helper()
	Need(t)
	if o.Init == "" {
		o.Init = GuestInit
	}
	k, err := kernel()
	if err != nil {
		t.Fatal(err)
	}
	image, err := initrd(k, &o)
	if err != nil {
		t.Fatal(err)
	}
	cfg := vm.Config{Kernel: k, Initrd: image, Cmdline: o.Cmdline, MemoryMiB: o.MemoryMiB, CPUs: o.CPUs,
		Network: o.Network, Reboot: o.Reboot, Args: o.Args, Accel: vm.Accel(os.Getenv("TATAMI_VM_ACCEL")), Vsock: o.Vsock, Dir: o.Dir}
	if os.Getenv("TATAMI_VM_CONSOLE") != "" {
		cfg.Console = os.Stderr
	}
	m, err := vm.Start(t.Context(), cfg)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		select {
		case <-m.Done():
			t.Logf("the virtual machine had ended: %v", m.Err())
		default:
		}
		if err := m.Close(); err != nil {
			t.Errorf("end of the virtual machine: %v", err)
		}
		if t.Failed() {
			t.Logf("console of the virtual machine:\n%s", m.Console())
		}
	})
	return m
}

// WaitReady waits until ready succeeds; the test fails when it does not.
func WaitReady(t testing.TB, m *vm.VM, ready func(context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), bootWait)
	defer cancel()
	if err := m.WaitReady(ctx, ready); err != nil {
		t.Fatal(err)
	}
}

// Guest is a guest whose daemon answers.
type Guest struct {
	*vm.VM
	Guest  imageservice.GuestService
	Runner imageservice.RunnerService
}

// Boot boots a guest with the daemon and waits until it answers.
func Boot(t testing.TB, o Options) *Guest {
	t.Helper()
	g := &Guest{VM: Start(t, o)}
	WaitReady(t, g.VM, func(ctx context.Context) error { return g.connect(ctx, t) })
	return g
}

// connect makes the clients if the daemon is well.
func (g *Guest) connect(ctx context.Context, t testing.TB) error {
	c, err := vsock.Dial(ctx, g.GuestAddress(vsock.GuestPort))
	if err != nil {
		return err
	}
	client := ttrpc.NewClient(c)
	guest := imageservice.NewGuestClient(client)
	if _, err := guest.Health(ctx, &imageservice.HealthRequest{}); err != nil {
		return errors.Join(err, client.Close())
	}
	g.Guest, g.Runner = guest, imageservice.NewRunnerClient(client)
	t.Cleanup(func() { _ = client.Close() }) // the machine may be gone
	return nil
}
