package vminit

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	// shareTag names the file system with the node's image files.
	shareTag = "tatami"
	// virtioFS is the number of such devices (virtio 1.2, section 5), as sysfs
	// shows it.
	virtioFS = "0x001a"

	virtioDevices = "/sys/bus/virtio/devices"
)

// mountShare mounts the node's image files at dir, if one of the devices has
// them. Images come another way without, so that a file system that cannot be
// mounted is a warning.
func mountShare(dir, devices string, log *slog.Logger) error {
	if dir == "" || !hasDevice(devices, virtioFS) {
		return nil
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	err := unix.Mount(shareTag, dir, "virtiofs", secure|unix.MS_RDONLY, "")
	if err == nil {
		return nil
	}
	log.Warn("virtio-fs with the node's images is not mounted", "tag", shareTag, "error", err)
	return os.Remove(dir)
}

// hasDevice says whether sysfs, at dir, lists a virtio device of this kind.
func hasDevice(dir, kind string) bool {
	files, _ := filepath.Glob(filepath.Join(dir, "*", "device")) // the pattern is well-formed
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && string(bytes.TrimSpace(b)) == kind {
			return true
		}
	}
	return false
}
