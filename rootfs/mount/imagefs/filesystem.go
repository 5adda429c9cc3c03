package imagefs

import (
	"context"
	"errors"
	"io"
	"syscall"

	"github.com/hanwen/go-fuse/v2/fuse"
)

// filesystem answers what the protocol server has taken apart. Everything that
// it does not have stays ENOSYS, which the kernel remembers and never asks again.
type filesystem struct {
	fuse.RawFileSystem
	s *Server
}

func (f *filesystem) String() string { return "tatami" }

func (f *filesystem) Lookup(_ <-chan struct{}, in *fuse.InHeader, name string, out *fuse.EntryOut) fuse.Status {
	n := f.s.nodeNamed(name)
	if in.NodeId != fuse.FUSE_ROOT_ID || n == nil {
		// An error, not node id 0: that would be a negative entry, and the name
		// may exist the next time.
		return fuse.ENOENT
	}
	FillEntry(out, n.ID, n.size)
	return fuse.OK
}

func (f *filesystem) GetAttr(_ <-chan struct{}, in *fuse.GetAttrIn, out *fuse.AttrOut) fuse.Status {
	if in.NodeId == fuse.FUSE_ROOT_ID {
		FillRoot(out)
		return fuse.OK
	}
	n := f.s.node(in.NodeId)
	if n == nil {
		return fuse.Status(syscall.ESTALE)
	}
	FillFile(out, n.ID, n.size)
	return fuse.OK
}

func (f *filesystem) Open(_ <-chan struct{}, in *fuse.OpenIn, out *fuse.OpenOut) fuse.Status {
	n := f.s.node(in.NodeId)
	switch {
	case n == nil:
		return fuse.Status(syscall.ESTALE)
	case n.sealed.Load():
		return fuse.EBUSY
	}
	// KEEP_CACHE: metadata that EROFS reads through the page cache of a
	// file-backed mount stays valid, whoever opens the file.
	out.OpenFlags = fuse.FOPEN_KEEP_CACHE | fuse.FOPEN_NOFLUSH
	if !n.Cached {
		out.OpenFlags |= fuse.FOPEN_DIRECT_IO
	}
	return fuse.OK
}

func (f *filesystem) Release(_ <-chan struct{}, in *fuse.ReleaseIn) {
	if f.s.released != nil {
		f.s.released(in.NodeId)
	}
}

func (f *filesystem) OpenDir(<-chan struct{}, *fuse.OpenIn, *fuse.OpenOut) fuse.Status {
	return fuse.OK
}

// ReadDir lists nothing: files are known by name to those who may open them.
func (f *filesystem) ReadDir(<-chan struct{}, *fuse.ReadIn, *fuse.DirEntryList) fuse.Status {
	return fuse.OK
}

func (f *filesystem) StatFs(_ <-chan struct{}, _ *fuse.InHeader, out *fuse.StatfsOut) fuse.Status {
	FillStatFs(out)
	return fuse.OK
}

// Read never returns less than was asked, except at the end: EROFS would take
// a short read for zeros or for an error.
func (f *filesystem) Read(_ <-chan struct{}, in *fuse.ReadIn, buf []byte) (fuse.ReadResult, fuse.Status) {
	n := f.s.enter(in.NodeId)
	if n == nil {
		return nil, fuse.Status(syscall.ESTALE)
	}
	defer n.leave()
	off := int64(in.Offset)
	if off < 0 || off >= n.size {
		return fuse.ReadResultData(nil), fuse.OK
	}
	buf = buf[:min(int64(len(buf)), n.size-off)]
	if st := f.s.readNode(f.s.callContext(in.Unique), n, buf, off); st != fuse.OK {
		return nil, st
	}
	return fuse.ReadResultData(buf), fuse.OK
}

func (s *Server) readNode(ctx context.Context, n *node, buf []byte, off int64) fuse.Status {
	if n.aborted.Load() {
		return fuse.EIO
	}
	got, err := n.File.ReadAt(ctx, buf, off)
	if got == len(buf) && (err == nil || errors.Is(err, io.EOF)) {
		s.reads.Add(1)
		s.readBytes.Add(int64(got))
		return fuse.OK
	}
	if n.aborted.Load() {
		return fuse.EIO
	}
	if ctx.Err() != nil {
		return fuse.EINTR
	}
	if err == nil {
		err = io.ErrUnexpectedEOF
	}
	s.failures.Add(1)
	s.complaints.add(n.Name, n.Reference, off, len(buf), err)
	return fuse.EIO
}
