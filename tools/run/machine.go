package run

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/tools/guestimage"
	"github.com/tatami-containers/tatami/tools/vm"
)

// registryPort is where a guest finds the registry when it pulls by itself.
const registryPort = 2112

// machine is a virtual machine whose init is tatami-guest.
type machine struct {
	o     *Options
	id    string
	dir   string // the initramfs and the machine's sockets
	vm    *vm.VM
	share *share        // nil when images come another way
	ended chan struct{} // the machine or its share has ended
	lost  error         // why the share has; written before ended is closed
}

func newMachine(o *Options, id string) (*machine, error) {
	dir, err := os.MkdirTemp("", "tatami-"+id+"-")
	if err != nil {
		return nil, fmt.Errorf("make the sandbox's directory: %w", err)
	}
	return &machine{o: o, id: id, dir: dir, ended: make(chan struct{})}, nil
}

func (m *machine) start(ctx context.Context) error {
	kernel, err := vm.FindKernel(m.o.Kernel)
	if err != nil {
		return err
	}
	initrd := filepath.Join(m.dir, "initrd")
	if err := buildInitrd(initrd, kernel); err != nil {
		return err
	}
	devices, err := m.startShare(ctx)
	if err != nil {
		return err
	}
	m.vm, err = vm.Start(ctx, vm.Config{
		Kernel: kernel, Initrd: initrd, Cmdline: m.cmdline(), Args: devices,
		MemoryMiB: m.o.MemoryMiB, CPUs: m.o.CPUs, Accel: accel(m.o.Accel),
		Dir: m.dir, Log: m.o.Log,
	})
	if err == nil {
		go m.watch() // ends with the machine
	}
	return err
}

// startShare starts what shows the guest the node's images, if they are to come
// so, and returns QEMU's arguments for it.
func (m *machine) startShare(ctx context.Context) ([]string, error) {
	bin, err := findShare(m.o)
	if bin == "" || err != nil {
		return nil, err
	}
	if m.share, err = startShare(ctx, bin, m.dir, m.o.imagesSocket(), m.id); err != nil {
		return nil, err
	}
	return m.share.device(), nil
}

// vmmEnd is how long QEMU may take to end after its connection to a share has.
const vmmEnd = 2 * time.Second

// watch waits for the end of the machine, or of its share, without which it
// would hang. A share ends well when the VMM has left, which is on its own way out
// then, and when it was told to.
func (m *machine) watch() {
	defer close(m.ended)
	if m.share == nil {
		<-m.vm.Done()
		return
	}
	select {
	case <-m.vm.Done():
		return
	case <-m.share.ended:
	}
	if m.share.err == nil {
		select {
		case <-m.vm.Done():
			return
		case <-time.After(vmmEnd):
		}
	}
	m.lost = m.share.reason()
}

func accel(name string) vm.Accel {
	if name == "auto" {
		return vm.AccelAuto
	}
	return vm.Accel(name)
}

// buildInitrd writes an archive with tatami-guest as init, the kernel's modules
// and an OCI runtime of this machine.
func buildInitrd(file string, kernel vm.Kernel) error {
	guest, err := FindProgram("tatami-guest")
	if err != nil {
		return err
	}
	runtime, err := FindRuntime()
	if err != nil {
		return err
	}
	f, err := os.Create(file)
	if err != nil {
		return fmt.Errorf("create the initramfs: %w", err)
	}
	defer f.Close()
	return guestimage.WriteInitramfs(f, guestimage.Options{Guest: guest, Modules: kernel.Modules, Runtime: runtime})
}

// cmdline configures the daemon in the guest.
func (m *machine) cmdline() string {
	args := []string{"tatami.runner=true", "tatami.cdh_socket=", "tatami.mount_path=" + m.o.MountPath}
	if m.o.Keep != "" {
		args = append(args, "tatami.store_dir="+m.o.Keep)
	}
	if m.o.Source == SourceRegistry {
		args = append(args, "tatami.host_address=", "tatami.relay_address=")
	}
	if m.o.pulls() {
		args = append(args, "tatami.registry=true", fmt.Sprintf("tatami.registry_address=vsock:%d:%d", vsock.HostCID, registryPort),
			"tatami.plain_http="+strings.Join(m.o.PlainHTTP, ","))
	} else {
		args = append(args, "tatami.registry=false")
	}
	return strings.Join(args, " ")
}

func (m *machine) addresses() addresses {
	return addresses{
		guest: m.vm.GuestAddress(vsock.GuestPort), streams: m.vm.GuestAddress(vsock.StreamPort),
		host: m.vm.HostAddress(vsock.HostPort), relay: m.vm.HostAddress(vsock.RelayPort),
		registry: m.vm.HostAddress(registryPort), cid: m.vm.CID(),
	}
}

// target is on the guest's own tmpfs.
func (m *machine) target() string { return "/run/tatami-containers/rootfs" }

func (m *machine) kind() string { return string(m.vm.Accel()) }

func (m *machine) done() <-chan struct{} { return m.ended }

func (m *machine) reason() error {
	if m.lost != nil {
		return m.lost
	}
	console := strings.Split(strings.TrimSpace(m.vm.Console()), "\n")
	tail := strings.Join(console[max(0, len(console)-10):], "\n")
	if err := m.vm.Err(); err != nil {
		return fmt.Errorf("%w\n%s", err, tail)
	}
	return fmt.Errorf("the virtual machine powered off; its console ends with\n%s", tail)
}

func (m *machine) close(ctx context.Context) error {
	if m.vm != nil {
		_ = m.vm.Close() // a machine that died has told already why it did
	}
	var err error
	if m.share != nil {
		err = m.share.close(ctx)
	}
	return errors.Join(err, os.RemoveAll(m.dir))
}
