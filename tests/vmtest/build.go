package vmtest

import (
	"crypto/sha256"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/tatami-containers/tatami/tools/initramfs"
	"github.com/tatami-containers/tatami/tools/vm"
	"golang.org/x/sys/unix"
)

// modules are what a guest needs for vsock, images, containers, a network card,
// disks and virtio-fs.
var (
	modules         = []string{"virtio_pci", "vmw_vsock_virtio_transport", "erofs", "overlay", "loop", "fuse"}
	optionalModules = []string{"vsock_loopback", "virtio_net", "virtio_blk", "virtiofs", "ext4"}
)

// artefacts are built once in a test process, whichever test comes first. They
// live in memory files, which end with the process.
var artefacts = cache{files: map[string]*os.File{}}

type cache struct {
	mu    sync.Mutex
	files map[string]*os.File // protected by mu
}

// get returns a path to what build has made for key.
func (c *cache) get(key string, build func(f *os.File) error) (string, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	f := c.files[key]
	if f == nil {
		fd, err := unix.MemfdCreate(filepath.Base(key), unix.MFD_CLOEXEC)
		if err != nil {
			return "", err
		}
		f = os.NewFile(uintptr(fd), key)
		if err := build(f); err != nil {
			_ = f.Close() // the error before is the one to report
			return "", err
		}
		c.files[key] = f
	}
	// Not /proc/self: QEMU opens it as well.
	return fmt.Sprintf("/proc/%d/fd/%d", os.Getpid(), f.Fd()), nil
}

// program builds a package of this module, static.
func program(pkg string) (string, error) {
	return artefacts.get(pkg, func(f *os.File) error {
		dir, err := os.MkdirTemp("", "vmtest-")
		if err != nil {
			return err
		}
		defer os.RemoveAll(dir)
		out := filepath.Join(dir, "out")
		cmd := exec.Command("go", "build", "-trimpath", "-ldflags=-s -w", "-o", out, pkg) //nolint:noctx // bounded by the test binary's own time
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if msg, err := cmd.CombinedOutput(); err != nil {
			return fmt.Errorf("build %s: %w: %s", pkg, err, msg)
		}
		in, err := os.Open(out)
		if err != nil {
			return err
		}
		defer in.Close()
		_, err = io.Copy(f, in)
		return err
	})
}

// initrd builds the guest's first root file system.
func initrd(k vm.Kernel, o *Options) (string, error) {
	prog, err := program(o.Init)
	if err != nil {
		return "", err
	}
	cfg := initramfs.Config{Init: prog, ModuleDir: k.Modules, Modules: slices.Concat(modules, o.Modules),
		OptionalModules: slices.Concat(optionalModules, o.OptionalModules), Files: o.Files}
	for _, bin := range append([]string{"/usr/bin/crun", "/usr/sbin/runc", "/usr/bin/runc"}, o.Binaries...) {
		if _, err := os.Stat(bin); err == nil || slices.Contains(o.Binaries, bin) {
			cfg.Binaries = append(cfg.Binaries, bin)
		}
	}
	if busybox, err := exec.LookPath("busybox"); err == nil {
		cfg.Busybox = busybox
	}
	key := []string{k.Image, prog, strings.Join(slices.Concat(cfg.Modules, cfg.OptionalModules), " "), strings.Join(cfg.Binaries, " ")}
	for name, data := range o.Files {
		key = append(key, fmt.Sprintf("%s %x", name, sha256.Sum256(data)))
	}
	slices.Sort(key[4:])
	return artefacts.get(strings.Join(key, "\x00"), func(f *os.File) error { return initramfs.Build(f, cfg) })
}
