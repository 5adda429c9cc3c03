package transport

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"syscall"

	"github.com/containerd/errdefs"
)

// files are what a directory or an archive has, by slash-separated names.
type files interface {
	// open returns a regular file. A name that is not there is errdefs.ErrNotFound.
	open(name string) (file, error)
	Close() error
}

type file interface {
	io.ReaderAt
	io.Closer
	Size() int64 // bytes
}

// readFile reads a file of at most limit bytes.
func readFile(fs files, name string, limit int64) ([]byte, error) {
	f, err := fs.open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	if f.Size() > limit {
		return nil, fmt.Errorf("%s has %d bytes, more than the %d that are read: %w", name, f.Size(), limit, errdefs.ErrInvalidArgument)
	}
	data := make([]byte, f.Size())
	if _, err := f.ReadAt(data, 0); err != nil && !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("read %s: %w", name, err)
	}
	return data, nil
}

// directory is files below a directory, which no link leads out of.
type directory struct{ root *os.Root }

func (d directory) open(name string) (file, error) {
	// Without O_NONBLOCK a named pipe would wait for its writer.
	f, err := d.root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file: %w", name, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return diskFile{f, st.Size()}, nil
}

func (d directory) Close() error { return d.root.Close() }

type diskFile struct {
	*os.File
	size int64
}

func (f diskFile) Size() int64 { return f.size }

// fileBlob is a layer.Blob in a file.
type fileBlob struct {
	open func() (file, error)
	size int64
}

func (b fileBlob) Size() int64 { return b.size }

func (b fileBlob) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	if off < 0 || n < 0 || n > b.size-off {
		return nil, fmt.Errorf("the range of %d bytes at %d is not in the blob's %d bytes: %w", n, off, b.size, errdefs.ErrOutOfRange)
	}
	f, err := b.open()
	if err != nil {
		return nil, err
	}
	return verified{&whole{ctx: ctx, r: io.NewSectionReader(f, off, n), left: n}, f}, nil
}

// whole reads n bytes or fails, and ends with its context.
type whole struct {
	ctx  context.Context
	r    io.Reader
	left int64
}

func (w *whole) Read(p []byte) (int, error) {
	if err := w.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := w.r.Read(p)
	w.left -= int64(n)
	if errors.Is(err, io.EOF) && w.left > 0 {
		err = io.ErrUnexpectedEOF
	}
	return n, err
}
