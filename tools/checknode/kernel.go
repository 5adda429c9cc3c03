package checknode

import (
	"bytes"
	"fmt"
	"path"
	"slices"
	"strings"
)

// Programs and devices of the node.
const (
	helper      = "/opt/tatami/bin/nydus-overlayfs-tatami"
	mountFuse   = "mount.fuse"
	fuseDevice  = "/dev/fuse"
	loopDevice  = "/dev/loop-control"
	vsockDevice = "/dev/vhost-vsock"
)

// searchPath is where containerd finds programs as a service of systemd.
var searchPath = []string{"/usr/local/sbin", "/usr/local/bin", "/usr/sbin", "/usr/bin", "/sbin", "/bin"}

// kernel looks at what the modes in use need of the node. The kernel's name is
// empty where the node does not run, and then only files are looked at.
func (n *node) kernel(h *host, handlers []Handler) (string, []Finding) {
	var used []string
	vsock := false
	for _, x := range handlers {
		if x.Mode != "" {
			used = append(used, x.Mode)
			vsock = vsock || strings.HasSuffix(x.Runtime, ", "+qemu)
		}
	}
	if len(used) == 0 {
		return "", nil
	}
	var out []Finding
	if slices.Contains(used, modeGuest) {
		out = n.mountHelper(h.helper)
	}
	release, err := n.files.read("/proc/sys/kernel/osrelease", maxFile)
	if err != nil {
		return "", append(out, Finding{Severity: Note, What: "the node does not run: kernel, devices and sockets were not looked at"})
	}
	name := string(bytes.TrimSpace(release))
	out = append(out, n.filesystems(name)...)
	if vsock {
		out = append(out, n.device(vsockDevice, "vhost_vsock", "QEMU's guests cannot be reached")...)
	}
	return name, out
}

// mountHelper: containerd runs mount.fuse, and that the helper, for mounts of
// type fuse.PATH (core/mount/mount_linux.go), to look up a container's user.
func (n *node) mountHelper(helper string) []Finding {
	var out []Finding
	if st, err := n.files.stat(helper); err != nil || st.Mode()&0o111 == 0 {
		out = append(out, Finding{Severity: Error, What: helper + " is not there or cannot be run: containers of mode guest do not start",
			Add: []string{"install -D -t " + path.Dir(helper) + " nydus-overlayfs-tatami"}})
	}
	if !slices.ContainsFunc(searchPath, func(dir string) bool { return n.files.exists(path.Join(dir, mountFuse)) }) {
		out = append(out, Finding{Severity: Error, What: mountFuse + " is not there: containers of mode guest do not start",
			Add: []string{"apt-get install fuse3"}})
	}
	return out
}

// filesystems looks for what mounting an image on the node takes, which every
// mode does, if only to look up users.
func (n *node) filesystems(release string) []Finding {
	out := n.device(fuseDevice, "fuse", "images cannot be served")
	for _, name := range []string{"erofs", "overlay"} {
		if !n.hasFilesystem(name) && !n.hasModule(release, name) {
			out = append(out, Finding{Severity: Error, What: fmt.Sprintf("kernel %s has no file system %s", release, name)})
		}
	}
	// File-backed mounts of EROFS came with 6.12; before, images are mounted
	// through loop devices (rootfs/mount).
	if v, err := parseVersion(release); err != nil || !v.atLeast(6, 12) {
		out = append(out, n.device(loopDevice, "loop", "images cannot be mounted before Linux 6.12")...)
	}
	return out
}

// device looks for a device file; its module may still make it.
func (n *node) device(file, module, why string) []Finding {
	if n.files.exists(file) {
		return nil
	}
	return []Finding{{Severity: Error, What: fmt.Sprintf("%s is not there: %s", file, why), Add: []string{"modprobe " + module},
		File: "/etc/modules-load.d/tatami.conf"}}
}

func (n *node) hasFilesystem(name string) bool {
	data, err := n.files.read("/proc/filesystems", maxFile)
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(data)) {
		if f := strings.Fields(line); len(f) > 0 && f[len(f)-1] == name {
			return true
		}
	}
	return false
}

// hasModule looks for a module that the kernel would load by itself: modules.dep
// has a line "path/NAME.ko[.xz]: ..." of each (depmod(8)).
func (n *node) hasModule(release, name string) bool {
	if strings.ContainsAny(release, "/\x00") {
		return false
	}
	data, err := n.files.read(path.Join("/lib/modules", release, "modules.dep"), maxFile)
	return err == nil && bytes.Contains(append([]byte("\n"), data...), []byte("/"+name+".ko"))
}
