package vmtest_test

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/tests/vmtest"
	"github.com/tatami-containers/tatami/tools/vm"
)

// TestOtherDevice runs the same guest and the same clients on the device of
// another project (rust-vmm's vhost-device-vsock): what both do alike is the
// hybrid protocol, not a habit of ours. That device ends both directions when the
// host peer ends one, so nothing here depends on a half close.
func TestOtherDevice(t *testing.T) {
	vmtest.Need(t)
	bin := os.Getenv("TATAMI_VHOST_DEVICE_VSOCK")
	if bin == "" {
		var err error
		if bin, err = exec.LookPath("vhost-device-vsock"); err != nil {
			t.Skip("needs vhost-device-vsock in PATH or TATAMI_VHOST_DEVICE_VSOCK (cargo install vhost-device-vsock)")
		}
	}
	dir, err := os.MkdirTemp("", "peer-") //nolint:usetesting // sockets are below it: the path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	vmm, host := filepath.Join(dir, "vmm"), filepath.Join(dir, "host")
	startPeer(t, bin, vmm, host)
	m := vmtest.Start(t, vmtest.Options{Init: testInit, Vsock: vm.VsockNone, Args: []string{
		"-chardev", "socket,id=peer,path=" + vmm, "-device", "vhost-user-vsock-pci,chardev=peer"}})
	address := func(port uint32) string {
		return vsock.Address{Network: vsock.Hybrid, Path: host, Port: port}.String()
	}
	g := &guest{t: t, addr: address(testPort), host: address}
	// Not by dialling: a client that comes before the driver is never answered, nor
	// are those behind it.
	vmtest.WaitReady(t, m, func(context.Context) error {
		if !strings.Contains(m.Console(), "testinit: ready") {
			return errors.New("init is not ready")
		}
		return nil
	})
	keepOpen := func() error { return nil }
	for _, n := range []int64{1, 4096, 4097, 5<<20 + 3} {
		if err := roundTrip(g.run("echo"), n, n, keepOpen); err != nil {
			t.Errorf("echo of %d bytes: %v", n, err)
		}
	}
	fromGuest(t, g, func(c stream) error { return roundTrip(c, 2<<20, 7, keepOpen) })
	t.Run("throughput", func(t *testing.T) { testThroughput(t, m, &guest{t, g.addr, g.host}) })
}

func startPeer(t *testing.T, bin, vmm, host string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), bin, "--guest-cid=3", "--socket="+vmm, "--uds-path="+host)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended with its VMM
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("vhost-device-vsock: %s", &out)
		}
	})
	for !exists(vmm) || !exists(host) {
		if err := cmd.Process.Signal(syscall.Signal(0)); err != nil {
			t.Fatalf("vhost-device-vsock ended: %s", &out)
		}
		time.Sleep(10 * time.Millisecond)
	}
}
