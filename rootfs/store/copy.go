package store

import (
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// copyRange copies n bytes of src at srcOff to dst at dstOff. Holes are not
// copied: dst must be zeros there. Where the filesystem can, blocks are shared.
// Offsets and n are whole blocks.
func copyRange(dst *os.File, dstOff int64, src *os.File, srcOff, n int64) error {
	if st, err := src.Stat(); err != nil || st.Size() < srcOff+n {
		return fmt.Errorf("copy %s: it does not have %d bytes at %d: %w", src.Name(), n, srcOff, errors.Join(errdefs.ErrDataLoss, err))
	}
	for at, end := srcOff, srcOff+n; at < end; {
		data, err := unix.Seek(int(src.Fd()), at, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) || err == nil && data >= end {
			return nil
		}
		if err != nil {
			return fmt.Errorf("copy %s: %w", src.Name(), err)
		}
		hole, err := unix.Seek(int(src.Fd()), data, unix.SEEK_HOLE)
		if err != nil {
			return fmt.Errorf("copy %s: %w", src.Name(), err)
		}
		at = min(hole, end)
		if err := copyData(dst, dstOff+data-srcOff, src, data, at-data); err != nil {
			return fmt.Errorf("copy %s: %w", src.Name(), err)
		}
	}
	return nil
}

// copyData copies one run of data by the best way that works.
func copyData(dst *os.File, dstOff int64, src *os.File, srcOff, n int64) error {
	err := unix.IoctlFileCloneRange(int(dst.Fd()), &unix.FileCloneRange{
		Src_fd: int64(src.Fd()), Src_offset: uint64(srcOff), Src_length: uint64(n), Dest_offset: uint64(dstOff),
	})
	if err == nil {
		return nil
	}
	for n > 0 {
		m, err := unix.CopyFileRange(int(src.Fd()), &srcOff, int(dst.Fd()), &dstOff, int(min(n, 1<<30)), 0)
		if err != nil || m == 0 {
			break // not on this filesystem, or a real error: then the plain way meets it again
		}
		n -= int64(m)
	}
	_, err = io.CopyN(io.NewOffsetWriter(dst, dstOff), io.NewSectionReader(src, srcOff, n), n)
	return err
}

// diskUsage is how many bytes of disk a file takes, 0 when it cannot be told.
func diskUsage(name string) int64 {
	var st unix.Stat_t
	if unix.Stat(name, &st) != nil {
		return 0
	}
	return st.Blocks * 512
}
