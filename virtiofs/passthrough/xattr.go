package passthrough

import (
	"bytes"
	"errors"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const maxXAttr = 64 << 10 // XATTR_SIZE_MAX and XATTR_LIST_MAX of Linux

// kept begins the names under which the node keeps attributes that are not its own.
const kept = "user.virtiofs."

// stored is the name under which the node has an attribute of the guest; an error, that
// of setting it, when it is not the guest's: access control lists would need the guest's
// umask, trusted ones are the node's own.
func (f *FS) stored(name string) (string, error) {
	switch {
	case name == "system.posix_acl_access" || name == "system.posix_acl_default":
		return "", unix.EOPNOTSUPP
	case f.o.Trusted && strings.HasPrefix(name, "trusted."):
		name = kept + name
	case strings.HasPrefix(name, "trusted."), f.o.Trusted && strings.HasPrefix(name, kept):
		return "", unix.EPERM
	case name == "":
		return "", unix.EINVAL
	}
	if len(name) > maxName {
		return "", unix.ERANGE
	}
	return name, nil
}

// shown is the name that a guest has for an attribute of the node, or "".
func (f *FS) shown(name string) string {
	if _, err := f.stored(name); err == nil {
		return name
	}
	if own, ok := strings.CutPrefix(name, kept); ok && f.o.Trusted && strings.HasPrefix(own, "trusted.") {
		return own
	}
	return ""
}

// attributed does something with the extended attributes of a node.
func (f *FS) attributed(id uint64, do func(fd int) error) error {
	if !f.o.XAttr {
		return unix.EOPNOTSUPP
	}
	n, err := f.nodes.get(id)
	if err != nil {
		return err
	}
	defer n.put()
	if !n.openable() {
		return unix.EOPNOTSUPP // O_PATH descriptors do not allow it
	}
	fd, err := f.reopen(n.fd, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return do(fd)
}

func (f *FS) GetXAttr(_ <-chan struct{}, in *fuse.InHeader, name string, dest []byte) (size uint32, _ fuse.Status) {
	name, err := f.stored(name)
	if errors.Is(err, unix.EPERM) {
		return 0, fuse.ENODATA
	} else if err != nil {
		return 0, status(err)
	}
	err = f.attributed(in.NodeId, func(fd int) error {
		n, err := unix.Fgetxattr(fd, name, dest)
		size = uint32(max(n, 0))
		return err
	})
	return size, status(err)
}

func (f *FS) ListXAttr(_ <-chan struct{}, in *fuse.InHeader, dest []byte) (uint32, fuse.Status) {
	var names []byte
	err := f.attributed(in.NodeId, func(fd int) error {
		all := make([]byte, maxXAttr)
		n, err := unix.Flistxattr(fd, all)
		if err != nil {
			return err
		}
		for name := range bytes.SplitSeq(all[:n], []byte{0}) {
			if s := f.shown(string(name)); s != "" {
				names = append(append(names, s...), 0)
			}
		}
		return nil
	})
	if err == nil && len(dest) > 0 && len(names) > len(dest) {
		err = unix.ERANGE
	}
	copy(dest, names)
	return uint32(len(names)), status(err)
}

func (f *FS) SetXAttr(_ <-chan struct{}, in *fuse.SetXAttrIn, name string, data []byte) fuse.Status {
	stored, err := f.setable(name)
	if err != nil {
		return status(err)
	}
	if int64(in.Size) != int64(len(data)) {
		return fuse.EINVAL
	}
	err = f.attributed(in.NodeId, func(fd int) error { return unix.Fsetxattr(fd, stored, data, int(in.Flags)) })
	return status(onLink(err, stored))
}

func (f *FS) RemoveXAttr(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	stored, err := f.setable(name)
	if err != nil {
		return status(err)
	}
	err = f.attributed(in.NodeId, func(fd int) error { return unix.Fremovexattr(fd, stored) })
	return status(onLink(err, stored))
}

// setable is stored for a change.
func (f *FS) setable(name string) (string, error) {
	if err := f.readOnly(); err != nil {
		return "", err
	}
	return f.stored(name)
}

// onLink is the error of setting an attribute which the node's own file systems give for
// links and the like: not that no file may have it.
func onLink(err error, stored string) error {
	if errors.Is(err, unix.EOPNOTSUPP) && strings.HasPrefix(stored, kept) {
		return unix.EPERM
	}
	return err
}
