package passthrough

import (
	"errors"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

const maxName = 255 // bytes, NAME_MAX

// beneath keeps a name in its directory, whatever it is or becomes.
const beneath = unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS

// checkName refuses what is not the name of one thing in a directory.
func checkName(name string) error {
	switch {
	case len(name) > maxName:
		return unix.ENAMETOOLONG
	case name == "" || name == "." || name == ".." || strings.ContainsAny(name, "/\x00"):
		return unix.EINVAL
	}
	return nil
}

// parent is the directory of a request with a name. put ends its use.
func (f *FS) parent(id uint64, name string) (*node, error) {
	if err := checkName(name); err != nil {
		return nil, err
	}
	n, err := f.nodes.get(id)
	if err == nil && n.kind != unix.S_IFDIR {
		n.put()
		return nil, unix.ENOTDIR
	}
	return n, err
}

// changed is parent for a change.
func (f *FS) changed(id uint64, name string) (*node, error) {
	if err := f.readOnly(); err != nil {
		return nil, err
	}
	return f.parent(id, name)
}

func (f *FS) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	p, err := f.parent(in.NodeId, name)
	if err != nil {
		return status(err)
	}
	defer p.put()
	return status(f.lookup(p, name, out))
}

// lookup tells the guest of what has the name in a directory.
func (f *FS) lookup(p *node, name string, out *fuse.EntryOut) error {
	_, err := f.tell(p, out, func() (int, error) {
		return openat2(p.fd, name, unix.O_PATH, 0)
	})
	return err
}

// openat2 opens a name in a directory, never what a symbolic link of that name is to.
func openat2(dir int, name string, flags, mode uint64) (int, error) {
	how := unix.OpenHow{Flags: flags | unix.O_NOFOLLOW | unix.O_CLOEXEC, Mode: mode, Resolve: beneath}
	return retry(func() (int, error) { return unix.Openat2(dir, name, &how) })
}

// tell tells the guest of the file that open opens with O_PATH, which lies in p.
func (f *FS) tell(p *node, out *fuse.EntryOut, open func() (int, error)) (*node, error) {
	if err := f.take(); err != nil {
		return nil, err
	}
	fd, err := open()
	if err != nil {
		f.o.Budget.give(1)
		return nil, err
	}
	st, err := statx(fd)
	if err != nil {
		_ = unix.Close(fd) // O_PATH: nothing is lost
		f.o.Budget.give(1)
		return nil, err
	}
	n, err := f.nodes.add(fd, &st)
	if err != nil {
		return nil, err
	}
	*out = fuse.EntryOut{NodeId: n.id}
	fillAttr(&out.Attr, &st)
	if f.o.AnnounceSubmounts && n.kind == unix.S_IFDIR && n.key.elsewhere(p.key) {
		out.Attr.Flags = fuse.ATTR_SUBMOUNT
	}
	out.SetEntryTimeout(f.valid)
	out.SetAttrTimeout(f.valid)
	return n, nil
}

// elsewhere says whether two files lie on different mounts.
func (k key) elsewhere(o key) bool {
	return k.major != o.major || k.minor != o.minor || k.mount != o.mount
}

// make makes something with a name for the caller, and tells the guest of it.
func (f *FS) make(in *fuse.InHeader, name string, out *fuse.EntryOut, call func(dir int) error) fuse.Status {
	p, err := f.changed(in.NodeId, name)
	if err != nil {
		return status(err)
	}
	defer p.put()
	if err := as(in.Caller, func() error { return call(p.fd) }); err != nil {
		return status(err)
	}
	return status(f.lookup(p, name, out))
}

func (f *FS) Mkdir(_ <-chan struct{}, in *fuse.MkdirIn, name string, out *fuse.EntryOut) fuse.Status {
	return f.make(&in.InHeader, name, out, func(dir int) error { return unix.Mkdirat(dir, name, in.Mode&0o7777) })
}

// Mknod makes devices, too: they are of no use to others than the guest where the
// directory's parents or mount options keep them from the node's users.
func (f *FS) Mknod(_ <-chan struct{}, in *fuse.MknodIn, name string, out *fuse.EntryOut) fuse.Status {
	return f.make(&in.InHeader, name, out, func(dir int) error { return unix.Mknodat(dir, name, in.Mode, int(in.Rdev)) })
}

func (f *FS) Symlink(_ <-chan struct{}, in *fuse.InHeader, target, name string, out *fuse.EntryOut) fuse.Status {
	return f.make(in, name, out, func(dir int) error { return unix.Symlinkat(target, dir, name) })
}

func (f *FS) Readlink(_ <-chan struct{}, in *fuse.InHeader) ([]byte, fuse.Status) {
	n, err := f.nodes.get(in.NodeId)
	if err != nil {
		return nil, status(err)
	}
	defer n.put()
	if n.kind != unix.S_IFLNK {
		return nil, fuse.EINVAL
	}
	buf := make([]byte, unix.PathMax)
	got, err := retry(func() (int, error) { return unix.Readlinkat(n.fd, "", buf) })
	return buf[:max(got, 0)], status(err)
}

// Create opens what is there already, if that is allowed and a file to be opened.
func (f *FS) Create(_ <-chan struct{}, in *fuse.CreateIn, name string, out *fuse.CreateOut) fuse.Status {
	flags, err := f.openFlags(in.Flags)
	if err != nil {
		return status(err)
	}
	p, err := f.changed(in.NodeId, name)
	if err != nil {
		return status(err)
	}
	defer p.put()
	err = f.create(p, in, name, flags, out)
	if !errors.Is(err, unix.EEXIST) || in.Flags&unix.O_EXCL != 0 {
		return status(err)
	}
	return status(f.openExisting(p, in, name, flags, out))
}

// create makes a file. What it tells of is the file that was made, whoever has given
// its name to another one meanwhile.
func (f *FS) create(p *node, in *fuse.CreateIn, name string, flags int, out *fuse.CreateOut) error {
	if err := f.take(); err != nil {
		return err
	}
	var fd int
	err := as(in.Caller, func() (err error) {
		fd, err = openat2(p.fd, name, uint64(flags|unix.O_CREAT|unix.O_EXCL), uint64(in.Mode&0o7777))
		return err
	})
	if err != nil {
		f.o.Budget.give(1)
		return err
	}
	n, err := f.tell(p, &out.EntryOut, func() (int, error) { return f.reopen(fd, unix.O_PATH) })
	if err != nil {
		f.o.Budget.give(1)
		_ = unix.Close(fd) // nothing was written
		return err
	}
	out.OpenFlags = f.cacheFlags(unix.S_IFREG)
	out.Fh, err = f.handles.add(n.id, unix.S_IFREG, fd)
	return err
}

// openExisting is Create of a file that is there.
func (f *FS) openExisting(p *node, in *fuse.CreateIn, name string, flags int, out *fuse.CreateOut) error {
	if err := f.lookup(p, name, &out.EntryOut); err != nil {
		return err
	}
	n, err := f.nodes.get(out.NodeId)
	if err != nil {
		return err
	}
	defer n.put()
	err = f.open(n, unix.S_IFREG, flags, in.OpenFlags&fuse.OPEN_KILL_SUIDGID != 0, &out.OpenOut)
	if err != nil {
		f.nodes.forget(n.id, 1) // the guest hears of the error only
	}
	return err
}

func (f *FS) Unlink(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	return f.unlink(in, name, 0)
}

func (f *FS) Rmdir(_ <-chan struct{}, in *fuse.InHeader, name string) fuse.Status {
	return f.unlink(in, name, unix.AT_REMOVEDIR)
}

func (f *FS) unlink(in *fuse.InHeader, name string, flags int) fuse.Status {
	p, err := f.changed(in.NodeId, name)
	if err != nil {
		return status(err)
	}
	defer p.put()
	return status(unix.Unlinkat(p.fd, name, flags))
}

func (f *FS) Rename(_ <-chan struct{}, in *fuse.RenameIn, from, to string) fuse.Status {
	p, err := f.changed(in.NodeId, from)
	if err != nil {
		return status(err)
	}
	defer p.put()
	q, err := f.changed(in.Newdir, to)
	if err != nil {
		return status(err)
	}
	defer q.put()
	return status(unix.Renameat2(p.fd, from, q.fd, to, uint(in.Flags)))
}

// Link gives a file that the guest knows another name.
func (f *FS) Link(_ <-chan struct{}, in *fuse.LinkIn, name string, out *fuse.EntryOut) fuse.Status {
	p, err := f.changed(in.NodeId, name)
	if err != nil {
		return status(err)
	}
	defer p.put()
	n, err := f.nodes.get(in.Oldnodeid)
	if err != nil {
		return status(err)
	}
	defer n.put()
	err = f.magic(n.fd, func(proc int, link string) error {
		return unix.Linkat(proc, link, p.fd, name, unix.AT_SYMLINK_FOLLOW)
	})
	if err != nil {
		return status(err)
	}
	return status(f.lookup(p, name, out))
}

// Forget takes back what the guest was told.
func (f *FS) Forget(id, n uint64) { f.nodes.forget(id, n) }
