package guestimage

import (
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/vmtest"
	"github.com/tatami-containers/tatami/tools/initramfs"
	"github.com/tatami-containers/tatami/tools/vm"
)

// mountScript does in a guest what Kata's mount script does for each extension
// (kata-containers: src/agent/kata-extension-mount.sh): find the disk by its
// serial number, open the hash tree, mount. Then it reads a file.
const mountScript = `
export PATH=/usr/sbin:/bin DM_DISABLE_UDEV=1
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t devtmpfs dev /dev; mount -t tmpfs run /run
while read m; do insmod /lib/modules/$m || echo "insmod $m failed"; done </lib/modules/tatami.order
param() { tr ' ' '\n' </proc/cmdline | sed -n "s/^kata.extension.$1.verity_params=//p"; }
field() { param $1 | tr ',' '\n' | sed -n "s/^$2=//p"; }
for name in raw measured forged; do
	dev=$(grep -lx extension-$name /sys/block/*/serial | cut -d/ -f4)
	src=/dev/$dev
	if [ -b ${src}2 ]; then
		veritysetup open ${src}1 extension-$name ${src}2 $(field $name root_hash) --no-superblock \
			--hash-block-size=$(field $name hash_block_size) --data-block-size=$(field $name data_block_size) \
			--data-blocks=$(field $name data_blocks) --salt=$(field $name salt)
		src=/dev/mapper/extension-$name
	fi
	mkdir -p /run/kata-extensions/$name
	mount -t erofs -o ro $src /run/kata-extensions/$name
	echo "RESULT $name ${src%%$dev} $(sha256sum </run/kata-extensions/$name/usr/bin/tatami-guest)"
done
poweroff -f
`

// bootWait is for the slowest of shared machines.
const bootWait = 3 * time.Minute

// TestMountedInAGuest gives a guest three disks: a raw extension, a measured one
// and a measured one with a changed byte, of which the kernel gives out no more
// than the rest.
func TestMountedInAGuest(t *testing.T) {
	vmtest.Need(t)
	o := sources(t, Options{Kind: Extension, Arch: "amd64"})
	raw := make1(t, o)
	o.Verity = true
	measured, forged := make1(t, o), make1(t, o)
	forge(t, forged.File)
	var args []string
	cmdline := "kata.extension.raw.verity_params"
	for _, d := range []struct {
		name string
		r    *Result
	}{{"raw", raw}, {"measured", measured}, {"forged", forged}} {
		args = append(args, "-drive", "if=none,format=raw,readonly=on,id="+d.name+",file="+d.r.File,
			"-device", "virtio-blk-pci,drive="+d.name+",serial=extension-"+d.name)
		if d.r.VerityParams != "" {
			cmdline += fmt.Sprintf(" kata.extension.%s.verity_params=%s", d.name, d.r.VerityParams)
		}
	}
	console := runScript(t, mountScript, cmdline, args)
	sum := fmt.Sprintf("%x  -", sha256.Sum256([]byte(read(t, o.Guest))))
	for _, want := range []string{"RESULT raw /dev/ " + sum, "RESULT measured /dev/mapper/extension-measured " + sum} {
		if !strings.Contains(console, want) {
			t.Errorf("%q is missing", want)
		}
	}
	if strings.Contains(console, "extension-forged "+sum) || !strings.Contains(console, "RESULT forged /dev/mapper/extension-forged") || !strings.Contains(console, "is corrupted") {
		t.Error("the changed byte was not noticed")
	}
	if t.Failed() {
		t.Log(console)
	}
}

// forge changes the last byte of the program in the first partition.
func forge(t *testing.T, disk string) {
	t.Helper()
	b := []byte(read(t, disk))
	n := strings.LastIndex(string(b), "tatami-guest tatami-guest ")
	b[n] ^= 1
	if err := os.WriteFile(disk, b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// runScript boots a guest that runs a shell script and ends; it returns what was
// on the console.
func runScript(t *testing.T, script, cmdline string, args []string) string {
	t.Helper()
	k, err := vm.FindKernel(os.Getenv("TATAMI_VM_KERNEL"))
	if err != nil {
		t.Fatal(err)
	}
	initrd := filepath.Join(t.TempDir(), "initrd")
	f, err := os.Create(initrd)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	err = initramfs.Build(f, initramfs.Config{
		Init: lookPath(t, "busybox"), Busybox: lookPath(t, "busybox"), Binaries: []string{lookPath(t, "veritysetup")},
		ModuleDir: k.Modules, Modules: []string{"virtio_pci", "virtio_blk", "erofs", "dm_verity"},
		OptionalModules: []string{"sha256_generic"}, // built into some kernels
		Files:           map[string][]byte{"/etc/inittab": []byte("::sysinit:/bin/sh /etc/script\n"), "/etc/script": []byte(script)},
	})
	if err != nil {
		t.Fatal(err)
	}
	m, err := vm.Start(t.Context(), vm.Config{Kernel: k, Initrd: initrd, Cmdline: cmdline, MemoryMiB: 256,
		Accel: vm.Accel(os.Getenv("TATAMI_VM_ACCEL")), Vsock: vm.VsockNone, Args: args})
	if err != nil {
		t.Fatal(err)
	}
	select {
	case <-m.Done():
	case <-time.After(bootWait):
		t.Errorf("the guest did not end within %v", bootWait)
	}
	if err := m.Close(); err != nil {
		t.Errorf("the guest: %v", err)
	}
	return m.Console()
}

func lookPath(t *testing.T, name string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Fatal(err)
	}
	return path
}
