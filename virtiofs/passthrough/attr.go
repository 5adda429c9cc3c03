package passthrough

import (
	"math"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// fillAttr describes a file.
func fillAttr(a *fuse.Attr, st *unix.Statx_t) {
	*a = fuse.Attr{
		Ino: st.Ino, Size: st.Size, Blocks: st.Blocks, Mode: uint32(st.Mode), Nlink: st.Nlink, Blksize: st.Blksize,
		Atime: uint64(st.Atime.Sec), Mtime: uint64(st.Mtime.Sec), Ctime: uint64(st.Ctime.Sec),
		Atimensec: st.Atime.Nsec, Mtimensec: st.Mtime.Nsec, Ctimensec: st.Ctime.Nsec,
		Owner: fuse.Owner{Uid: st.Uid, Gid: st.Gid},
		Rdev:  encodeDevice(st.Rdev_major, st.Rdev_minor),
	}
}

// encodeDevice makes the number of a device as FUSE and mknod have it (new_encode_dev
// of linux/kdev_t.h).
func encodeDevice(major, minor uint32) uint32 { return minor&0xff | major<<8 | minor&^0xff<<12 }

// GetAttr implements fuse.RawFileSystem, as do all methods of FS that are not said to
// do something else.
func (f *FS) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	n, err := f.nodes.get(in.NodeId)
	if err != nil {
		return status(err)
	}
	defer n.put()
	return status(f.getAttr(n, out))
}

func (f *FS) getAttr(n *node, out *fuse.AttrOut) error {
	st, err := statx(n.fd)
	if err != nil {
		return err
	}
	fillAttr(&out.Attr, &st)
	out.SetTimeout(f.valid)
	return nil
}

func (f *FS) SetAttr(_ <-chan struct{}, in *fuse.SetAttrIn, out *fuse.AttrOut) fuse.Status {
	if err := f.readOnly(); err != nil {
		return status(err)
	}
	n, err := f.nodes.get(in.NodeId)
	if err != nil {
		return status(err)
	}
	defer n.put()
	// The owner first: that clears bits of the mode.
	for _, set := range []func(*node, *fuse.SetAttrIn) error{f.setOwner, f.setMode, f.setSize, f.setTimes} {
		if err := set(n, in); err != nil {
			return status(err)
		}
	}
	return status(f.getAttr(n, out))
}

func (f *FS) setOwner(n *node, in *fuse.SetAttrIn) error {
	uid, gid := -1, -1
	if in.Valid&fuse.FATTR_UID != 0 {
		uid = int(in.Uid)
	}
	if in.Valid&fuse.FATTR_GID != 0 {
		gid = int(in.Gid)
	}
	switch {
	case uid == math.MaxUint32 || gid == math.MaxUint32:
		return unix.EINVAL // -1 for the kernel, which means another thing
	case uid < 0 && gid < 0:
		return nil
	}
	return unix.Fchownat(n.fd, "", uid, gid, unix.AT_EMPTY_PATH|unix.AT_SYMLINK_NOFOLLOW)
}

func (f *FS) setMode(n *node, in *fuse.SetAttrIn) error {
	if in.Valid&fuse.FATTR_MODE == 0 {
		return nil
	}
	return f.magic(n.fd, func(proc int, link string) error { return unix.Fchmodat(proc, link, in.Mode&0o7777, 0) })
}

func (f *FS) setSize(n *node, in *fuse.SetAttrIn) error {
	if in.Valid&fuse.FATTR_SIZE == 0 {
		return nil
	}
	if n.kind != unix.S_IFREG || in.Size > math.MaxInt64 {
		return unix.EINVAL
	}
	return unprivileged(in.Valid&fuse.FATTR_KILL_SUIDGID != 0, func() error {
		if in.Valid&fuse.FATTR_FH != 0 {
			return f.handles.with(in.NodeId, in.Fh, func(fd int) error { return unix.Ftruncate(fd, int64(in.Size)) })
		}
		fd, err := f.reopen(n.fd, unix.O_WRONLY|unix.O_NONBLOCK)
		if err != nil {
			return err
		}
		defer unix.Close(fd)
		return unix.Ftruncate(fd, int64(in.Size))
	})
}

func (f *FS) setTimes(n *node, in *fuse.SetAttrIn) error {
	at, atSet := timespec(in.Valid, fuse.FATTR_ATIME, fuse.FATTR_ATIME_NOW, in.Atime, in.Atimensec)
	mt, mtSet := timespec(in.Valid, fuse.FATTR_MTIME, fuse.FATTR_MTIME_NOW, in.Mtime, in.Mtimensec)
	if !atSet && !mtSet {
		return nil
	}
	return f.magic(n.fd, func(proc int, link string) error {
		return unix.UtimesNanoAt(proc, link, []unix.Timespec{at, mt}, 0)
	})
}

// timespec is a time to set, and whether there is one.
func timespec(valid, set, now uint32, sec uint64, nsec uint32) (unix.Timespec, bool) {
	switch {
	case valid&now != 0:
		return unix.Timespec{Nsec: unix.UTIME_NOW}, true
	case valid&set == 0:
		return unix.Timespec{Nsec: unix.UTIME_OMIT}, false
	}
	return unix.Timespec{Sec: int64(sec), Nsec: int64(min(nsec, 1e9))}, true // 1e9 is refused
}

func (f *FS) StatFs(_ <-chan struct{}, in *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	n, err := f.nodes.get(in.NodeId)
	if err != nil {
		return status(err)
	}
	defer n.put()
	st, err := retry(func() (st unix.Statfs_t, err error) {
		err = unix.Fstatfs(n.fd, &st)
		return st, err
	})
	if err != nil {
		return status(err)
	}
	*out = fuse.StatfsOut{Blocks: st.Blocks, Bfree: st.Bfree, Bavail: st.Bavail, Files: st.Files, Ffree: st.Ffree,
		Bsize: uint32(st.Bsize), Frsize: uint32(st.Frsize), NameLen: uint32(st.Namelen)}
	return fuse.OK
}

// Access allows everything: the guest checks permissions and does not ask.
func (f *FS) Access(_ <-chan struct{}, in *fuse.AccessIn) fuse.Status {
	n, err := f.nodes.get(in.NodeId)
	if err == nil {
		n.put()
	}
	return status(err)
}
