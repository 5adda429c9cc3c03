package mount

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/mount/thread"
)

// superMagic is where an EROFS has its magic number, four bytes
// (struct erofs_super_block of fs/erofs/erofs_fs.h).
const superMagic = 1024

// measure begins the record of a lower on what the spec names.
func (s Spec) measure(ctx context.Context) (imageRecord, error) {
	rec := imageRecord{Version: recordVersion, Manifest: s.Manifest, Reference: s.Reference, Source: s.Source, Local: s.Local, State: Mounting, Released: s.Local != ""}
	if s.Image != nil {
		rec.Size = s.Image.Size()
		return rec, nil
	}
	var size int64 // written before done has its element
	done := isolated(func() (err error) {
		size, err = measureFile(s.Local)
		return err
	})
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		return rec, fmt.Errorf("mount image %s: wait for file %s: %w", s.Reference, s.Local, context.Cause(ctx))
	}
	if err != nil {
		return rec, fmt.Errorf("mount image %s from file %s: %w", s.Reference, s.Local, err)
	}
	rec.Size = size
	return rec, nil
}

// measureFile returns the size of the EROFS image at path in bytes. It opens
// neither devices nor pipes for reading and follows no link at the end of path.
// Precondition: the thread is isolated.
func measureFile(path string) (int64, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_NONBLOCK|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.ENOENT) {
		return 0, fmt.Errorf("it is not there: %w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return 0, fmt.Errorf("open: %w", err)
	}
	defer func() { _ = unix.Close(fd) }()
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return 0, fmt.Errorf("stat: %w", err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return 0, fmt.Errorf("it is no regular file; name the image itself: %w", errdefs.ErrInvalidArgument)
	}
	if !wholeBlocks(st.Size) {
		return 0, fmt.Errorf("it has %d bytes, not whole blocks of %d as images have; was it copied in full?: %w", st.Size, blockSize, errdefs.ErrInvalidArgument)
	}
	var magic [4]byte
	if n, err := unix.Pread(fd, magic[:], superMagic); n != len(magic) {
		return 0, fmt.Errorf("read the superblock: %w", errors.Join(err, errdefs.ErrUnavailable))
	}
	if binary.LittleEndian.Uint32(magic[:]) != erofsMagic {
		return 0, fmt.Errorf("it is no EROFS image; have it made again: %w", errdefs.ErrInvalidArgument)
	}
	return st.Size, nil
}

// mountLocal mounts the local file of a lower at dir.
func mountLocal(ctx context.Context, rec imageRecord, dir string) (string, error) {
	var device string // written before placed returns nil
	err := placed(ctx, dir, func() (fd int, err error) {
		device, fd, err = newLowerMount(ctx, rec.Path, rec.Local, rec.Size)
		return fd, err
	})
	if err != nil {
		return "", err
	}
	return device, nil
}

// placed puts the mount that f makes, on an isolated thread, at dir. Nobody can make
// the kernel's reads of a local file fail: when ctx ends first, the thread stays
// behind, and what it may mount later goes with it.
func placed(ctx context.Context, dir string, f func() (fd int, err error)) error {
	var decided atomic.Bool
	done := isolated(func() error {
		fd, err := f()
		if err != nil {
			return err
		}
		if !decided.CompareAndSwap(false, true) {
			return unix.Close(fd)
		}
		return place(fd, dir)
	})
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
	}
	if decided.CompareAndSwap(false, true) {
		return context.Cause(ctx)
	}
	return <-done // soon: it is being placed
}

// isolated runs f on an isolated thread. The channel gets its error; nobody need
// wait for that, as f may ask a filesystem that does not answer.
func isolated(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() { done <- thread.Isolated(f) }()
	return done
}
