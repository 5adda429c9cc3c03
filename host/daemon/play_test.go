package daemon

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"
)

// The test binary plays roles inside the namespaces of a service manager.
const (
	roleEnv   = "TATAMI_TEST_ROLE"
	initRole  = "init"  // becomes systemd
	mountRole = "mount" // mounts what it reads, an order, as containerd does
	dirEnv    = "TATAMI_TEST_DIR"
)

// order is what to mount where.
type order struct {
	Mounts []mount.Mount
	Target string
}

func play(role string) int {
	var err error
	switch role {
	case initRole:
		err = becomeSystemd(os.Getenv(dirEnv))
	case mountRole:
		var o order
		err = errors.Join(json.NewDecoder(os.Stdin).Decode(&o), os.MkdirAll(o.Target, 0o700), mount.All(o.Mounts, o.Target))
	default:
		err = fmt.Errorf("no role %q", role)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, role+":", err)
		return 1
	}
	return 0
}

// becomeSystemd runs systemd as the first process of this PID namespace, in this
// mount and cgroup namespace, over nothing of the machine that it could change:
// it would clean /tmp up, set sysctls, and start what the machine has enabled.
// dir is where it is outside; the units in dir/units are all there are.
func becomeSystemd(dir string) error {
	if os.Getpid() != 1 {
		return errors.New("not the first process of a PID namespace")
	}
	runtime.LockOSThread()
	outside, err := os.Lstat("/tmp")
	if err != nil {
		return err
	}
	keep, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	if err := furnish(dir, keep); err != nil {
		return err
	}
	inside, err := os.Lstat("/tmp")
	if err != nil || os.SameFile(outside, inside) {
		return errors.Join(err, errors.New("/tmp is that of the machine: systemd would remove what is in it"))
	}
	env := []string{"container=tatami", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}
	args := []string{"systemd", "--system", "--unit=test.target", "--log-target=console", "--log-level=info", "--show-status=no"}
	return unix.Exec("/lib/systemd/systemd", args, env)
}

// furnish makes the file systems of a machine of its own; keep is the directory
// dir of outside.
func furnish(dir string, keep int) error {
	var errs []error
	do := func(source, target, fstype string, flags uintptr, data string) {
		if err := unix.Mount(source, target, fstype, flags, data); err != nil {
			errs = append(errs, fmt.Errorf("mount %s at %s: %w", fstype, target, err))
		}
	}
	do("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
	do("proc", "/proc", "proc", 0, "")
	do("/proc/sys", "/proc/sys", "", unix.MS_BIND, "")
	do("", "/proc/sys", "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, "")
	do("cgroup2", "/sys/fs/cgroup", "cgroup2", 0, "")
	for _, own := range []string{"/tmp", "/var/tmp", "/run", "/etc/systemd/system"} {
		do("tmpfs", own, "tmpfs", 0, "mode=0755")
	}
	errs = append(errs, os.MkdirAll(dir, 0o700), os.MkdirAll("/run/systemd/system", 0o755), os.MkdirAll("/run/lock", 0o755))
	do(fmt.Sprintf("/proc/self/fd/%d", keep), dir, "", unix.MS_BIND, "")
	do(filepath.Join(dir, "console"), "/dev/console", "", unix.MS_BIND, "")
	if err := errors.Join(errs...); err != nil {
		return err
	}
	return errors.Join(os.CopyFS("/etc/systemd/system", os.DirFS(filepath.Join(dir, "units"))), mask())
}

// mask makes sure of what must never run: whatever has default dependencies
// needs sysinit.target, which is all that a machine does first.
func mask() error {
	var errs []error
	for _, unit := range []string{
		"sysinit.target", "basic.target", "network-online.target", "local-fs.target", "multi-user.target",
		"systemd-tmpfiles-setup.service", "systemd-tmpfiles-setup-dev.service", "systemd-tmpfiles-clean.service", "systemd-tmpfiles-clean.timer",
		"systemd-sysctl.service", "systemd-modules-load.service", "systemd-remount-fs.service", "systemd-random-seed.service",
		"systemd-udevd.service", "systemd-udev-trigger.service", "systemd-udevd-control.socket", "systemd-udevd-kernel.socket",
		"systemd-journald.service", "systemd-logind.service",
	} {
		errs = append(errs, os.Symlink(os.DevNull, filepath.Join("/etc/systemd/system", unit)))
	}
	return errors.Join(errs...)
}
