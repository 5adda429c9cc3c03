package unpack

import (
	"archive/tar"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// paxXattr marks extended attributes among the records of a PAX header, as
// star, GNU tar and every container tool write them.
const paxXattr = "SCHILY.xattr."

// trustedXattr are the machine's own attributes, overlay's among them: a layer
// that speaks those could make overlay show other directories than its own.
// containerd and rootfs/bootstrap leave them out, too.
const (
	trustedXattr = "trusted."
	overlayXattr = trustedXattr + "overlay."
)

func timesOf(hdr *tar.Header) [2]unix.Timespec {
	t := unix.Timespec{Sec: hdr.ModTime.Unix(), Nsec: int64(hdr.ModTime.Nanosecond())}
	return [2]unix.Timespec{t, t}
}

// permissions are the mode bits that chmod(2) takes.
func permissions(hdr *tar.Header) uint32 { return uint32(hdr.Mode) & 0o7777 }

// setFileAttributes is setAttributes for an open file, but for the time. Owner
// before mode and attributes: chown(2) takes away set-id bits and capabilities.
func setFileAttributes(fd int, hdr *tar.Header) error {
	if hdr.Uid != 0 || hdr.Gid != 0 {
		if err := unix.Fchown(fd, hdr.Uid, hdr.Gid); err != nil {
			return fmt.Errorf("set owner: %w", err)
		}
	}
	if err := setXattrs(hdr, func(name string, value []byte) error { return unix.Fsetxattr(fd, name, value, 0) }); err != nil {
		return err
	}
	if err := unix.Fchmod(fd, permissions(hdr)); err != nil {
		return fmt.Errorf("set mode: %w", err)
	}
	return nil
}

// setAttributes gives a name its owner, attributes, mode and time without
// following it.
func setAttributes(parent int, base string, hdr *tar.Header) error {
	if err := unix.Fchownat(parent, base, hdr.Uid, hdr.Gid, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set owner: %w", err)
	}
	set := func(name string, value []byte) error { return unix.Lsetxattr(procPath(parent, base), name, value, 0) }
	if err := setXattrs(hdr, set); err != nil {
		return err
	}
	if hdr.Typeflag != tar.TypeSymlink { // which has no mode of its own
		if err := unix.Fchmodat(parent, base, permissions(hdr), 0); err != nil {
			return fmt.Errorf("set mode: %w", err)
		}
	}
	return setTime(parent, base, timesOf(hdr))
}

func setTime(parent int, base string, t [2]unix.Timespec) error {
	if err := unix.UtimesNanoAt(parent, base, t[:], unix.AT_SYMLINK_NOFOLLOW); err != nil {
		return fmt.Errorf("set time: %w", err)
	}
	return nil
}

// setXattrs sets what the file system can hold: tmpfs has no user attributes
// before Linux 6.6, and Docker and containerd leave out the same.
func setXattrs(hdr *tar.Header, set func(name string, value []byte) error) error {
	for key, value := range hdr.PAXRecords {
		name, ok := strings.CutPrefix(key, paxXattr)
		if !ok || strings.HasPrefix(name, trustedXattr) {
			continue
		}
		err := set(name, []byte(value))
		// EPERM: user attributes are for files and directories only.
		if errors.Is(err, unix.ENOTSUP) || errors.Is(err, unix.EPERM) && strings.HasPrefix(name, "user.") {
			continue
		}
		if err != nil {
			return fmt.Errorf("set attribute %s: %w", name, err)
		}
	}
	return nil
}
