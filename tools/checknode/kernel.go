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
	helper    = "/opt/tatami/bin/nydus-overlayfs-tatami"
	mountFuse = "mount.fuse"
	// nydusOverlayfs is what mount.fuse runs for the type of mode nydus.
	nydusOverlayfs = "nydus-overlayfs"
	fuseDevice     = "/dev/fuse"
	loopDevice     = "/dev/loop-control"
	vsockDevice    = "/dev/vhost-vsock"
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
		out = n.mountHelper(modeGuest, h.helper, "install -D -t "+path.Dir(h.helper)+" nydus-overlayfs-tatami")
	}
	if slices.Contains(used, modeNydus) {
		out = append(out, n.mountHelper(modeNydus, n.inPath(nydusOverlayfs), "ln -s "+helper+" /usr/local/bin/"+nydusOverlayfs)...)
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
// type fuse.HELPER (core/mount/mount_linux.go), to look up a container's user. add
// is how to get it.
func (n *node) mountHelper(mode, helper, add string) []Finding {
	var out []Finding
	if st, err := n.files.stat(helper); err != nil || st.Mode()&0o111 == 0 {
		out = append(out, Finding{Severity: Error, What: fmt.Sprintf("%s is not there or cannot be run: containers of mode %s do not start", helper, mode),
			Add: []string{add}})
	}
	if !n.files.exists(n.inPath(mountFuse)) {
		out = append(out, Finding{Severity: Error, What: fmt.Sprintf("%s is not there: containers of mode %s do not start", mountFuse, mode),
			Add: []string{"apt-get install fuse3"}})
	}
	return out
}

// inPath is where containerd finds a program; its name when that is nowhere.
func (n *node) inPath(name string) string {
	for _, dir := range searchPath {
		if file := path.Join(dir, name); n.files.exists(file) {
			return file
		}
	}
	return name
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
