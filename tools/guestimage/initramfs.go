package guestimage

import (
	"fmt"
	"io"
	"os"
	"path"
	"runtime"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/tools/initramfs"
)

// Modules that the guest needs, and those that only some kernels have.
var (
	modules         = []string{"virtio_pci", "vmw_vsock_virtio_transport", "fuse", "erofs", "overlay", "loop"}
	optionalModules = []string{"virtio_net", "virtio_blk", "virtiofs"}
)

func (o *Options) writeInitramfs(f *os.File) error {
	if o.Arch != runtime.GOARCH {
		return fmt.Errorf("an initramfs has modules and an OCI runtime of this machine, which is %s: %w", runtime.GOARCH, errdefs.ErrInvalidArgument)
	}
	if _, err := staticProgram(o.Guest, o.Arch); err != nil {
		return err
	}
	return WriteInitramfs(f, *o)
}

// WriteInitramfs writes an archive with tatami-guest as init, modules of the
// kernel and an OCI runtime of this machine.
func WriteInitramfs(w io.Writer, o Options) error {
	cfg := initramfs.Config{
		Init: o.Guest, ModuleDir: o.Modules, Modules: modules, OptionalModules: optionalModules,
		Binaries: []string{o.Runtime},
	}
	if o.Config != "" {
		b, err := readFile(o.Config)
		if err != nil {
			return err
		}
		cfg.Files = map[string][]byte{path.Join("/", configPath): b}
	}
	return initramfs.Build(w, cfg)
}
