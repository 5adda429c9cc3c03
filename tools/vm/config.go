package vm

import (
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Accel is how guest instructions run.
type Accel string

// Kinds of Accel. Auto is KVM if a guest has booted on it (ProbeKVM), else TCG.
const (
	AccelAuto Accel = ""
	AccelKVM  Accel = "kvm"
	AccelTCG  Accel = "tcg"
)

// Vsock is what carries the guest's vsock.
type Vsock string

// Kinds of Vsock. Auto is the kernel's when /dev/vhost-vsock is there, else ours.
const (
	VsockAuto      Vsock = ""
	VsockVhost     Vsock = "vhost"      // AF_VSOCK on the node
	VsockVhostUser Vsock = "vhost-user" // package vhostvsock, hybrid sockets
	VsockNone      Vsock = "none"       // no device, unless Args has one
)

// Config describes a virtual machine.
type Config struct {
	QEMU    string // executable; qemu-system-x86_64 when empty
	Kernel  Kernel
	Initrd  string // path
	Cmdline string // added to the kernel's command line
	// MemoryMiB is the guest's memory in MiB, 512 when 0; CPUs 1 when 0.
	MemoryMiB, CPUs int
	Accel           Accel
	Vsock           Vsock
	// CID of the guest; 0 chooses one.
	CID uint32
	// Network adds a card that reaches the node's network through QEMU (addresses
	// 10.0.2.15/24, gateway 10.0.2.2). Nothing can connect to the guest.
	Network bool
	// Reboot lets the guest boot again instead of ending the machine.
	Reboot bool
	// Dir is where a private directory for sockets is made; the system's for
	// temporary files when empty. Its path must be short: a socket's has 107 bytes.
	Dir string
	// Console gets a copy of the serial console; may be nil.
	Console io.Writer
	// Args are more arguments for QEMU. The guest's memory can be shared with
	// vhost-user devices.
	Args []string
	Log  *slog.Logger // nil for none
}

func (c *Config) complete() error {
	if runtime.GOARCH != "amd64" {
		return fmt.Errorf("%w: virtual machines on %s", errdefs.ErrNotImplemented, runtime.GOARCH)
	}
	if c.QEMU == "" {
		c.QEMU = "qemu-system-x86_64"
	}
	if c.MemoryMiB == 0 {
		c.MemoryMiB = 512
	}
	if c.CPUs == 0 {
		c.CPUs = 1
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if c.Kernel.Image == "" || c.Initrd == "" || c.MemoryMiB < 0 || c.CPUs < 0 {
		return fmt.Errorf("%w: kernel %q, initrd %q, %d MiB, %d CPUs", errdefs.ErrInvalidArgument,
			c.Kernel.Image, c.Initrd, c.MemoryMiB, c.CPUs)
	}
	return nil
}

// cpu is QEMU's CPU model. Under TCG, cmpxchg16b of QEMU 7.2 leaves garbage in the
// flags, which kernels from 6.12 on trip over (double fault while booting).
func (c *Config) cpu(accel Accel) string {
	if accel == AccelKVM {
		return "host"
	}
	if compareReleases(c.Kernel.Release, "6.12") >= 0 {
		return "max,-cx16"
	}
	return "max"
}

// machine is the part of QEMU's arguments that every guest has.
func machine(c *Config, accel Accel) []string {
	engine := "tcg,thread=multi"
	if accel == AccelKVM {
		engine = "kvm"
	}
	memory := strconv.Itoa(c.MemoryMiB) + "M"
	// On a busy machine an emulated timer may miss the kernel's check of it, which
	// ends in a panic (arch/x86/kernel/apic/io_apic.c check_timer).
	cmdline := "console=ttyS0 panic=-1 no_timer_check quiet " + c.Cmdline
	return []string{
		"-nodefaults", "-no-user-config", "-display", "none",
		"-M", "q35,memory-backend=mem", "-accel", engine, "-cpu", c.cpu(accel),
		"-m", memory, "-smp", strconv.Itoa(c.CPUs),
		"-object", "memory-backend-memfd,id=mem,share=on,size=" + memory,
		"-chardev", "stdio,id=console,signal=off", "-serial", "chardev:console",
		"-kernel", c.Kernel.Image, "-append", strings.TrimSpace(cmdline),
	}
}

// args is the whole command line. dir holds the sockets.
func (c *Config) args(accel Accel, vsock Vsock, dir string) []string {
	args := append(machine(c, accel), "-initrd", c.Initrd)
	if !c.Reboot {
		args = append(args, "-no-reboot")
	}
	switch vsock {
	case VsockVhost:
		args = append(args, "-device", fmt.Sprintf("vhost-vsock-pci,guest-cid=%d", c.CID))
	case VsockVhostUser:
		args = append(args, "-chardev", "socket,id=vsock,path="+escape(filepath.Join(dir, vmmSocket)),
			"-device", "vhost-user-vsock-pci,chardev=vsock")
	}
	if c.Network {
		args = append(args, "-netdev", "user,id=net", "-device", "virtio-net-pci,netdev=net,romfile=")
	}
	return append(args, c.Args...)
}

// escape protects a value in QEMU's comma-separated options.
func escape(s string) string { return strings.ReplaceAll(s, ",", ",,") }
