// Package loop attaches read-only loop devices to files, with direct I/O, and
// switches them to another file while they are in use.
//
// Every device is set to clear itself: it is free again when the last user
// (the mount, or the descriptor that Attach returns) is gone.
package loop

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

const (
	controlPath = "/dev/loop-control"
	// blockSize is the logical block size of the devices in bytes. 4096 keeps
	// direct I/O possible on backing disks with 4 KiB sectors.
	blockSize  = 4096
	sectorSize = 512

	// retryEvery is the wait when another process took the free device first.
	retryEvery = 2 * time.Millisecond
	retries    = 500

	loopMajor = 7

	changeFD = 0x4C06 // LOOP_CHANGE_FD, include/uapi/linux/loop.h
)

// Device is an attached loop device. It holds a descriptor until Close; a
// mount keeps the device beyond that.
type Device struct {
	Path   string // "/dev/loop3"
	Number int
	// Direct tells whether direct I/O is on. Without it every byte is cached
	// twice, in the device and in the file.
	Direct bool
	fd     int
}

// Attach makes a loop device of the file that the descriptor backing has open.
// size is the file's length in bytes, a multiple of 512. It may wait for reads
// of the file.
func Attach(ctx context.Context, backing int, size int64) (*Device, error) {
	if size <= 0 || size%sectorSize != 0 {
		return nil, fmt.Errorf("attach loop device to a file of %d bytes: not a multiple of %d: %w", size, sectorSize, errdefs.ErrInvalidArgument)
	}
	for range retries {
		d, err := attachFree(backing, size)
		if err == nil {
			return d, nil
		}
		// Another process configured the device between our asking for a free
		// one and taking it.
		if !errors.Is(err, unix.EBUSY) {
			return nil, err
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("attach loop device: %w", ctx.Err())
		case <-time.After(retryEvery):
		}
	}
	return nil, fmt.Errorf("attach loop device: every free device was taken by others %d times: %w", retries, errdefs.ErrUnavailable)
}

func attachFree(backing int, size int64) (*Device, error) {
	number, err := freeNumber()
	if err != nil {
		return nil, err
	}
	d := &Device{Number: number, Path: "/dev/loop" + strconv.Itoa(number)}
	if d.fd, err = openDevice(d.Path, number); err != nil {
		return nil, err
	}
	if err := d.configure(backing, size); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

func freeNumber() (int, error) {
	fd, err := unix.Open(controlPath, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		return 0, fmt.Errorf("open %s: %w (the kernel needs CONFIG_BLK_DEV_LOOP or the module loop)", controlPath, err)
	}
	defer func() { _ = unix.Close(fd) }()
	n, err := unix.IoctlRetInt(fd, unix.LOOP_CTL_GET_FREE)
	if err != nil {
		return 0, fmt.Errorf("find a free loop device: %w", err)
	}
	return n, nil
}

// openDevice opens /dev/loopN and makes the node when nobody (udev, devtmpfs)
// did.
func openDevice(path string, number int) (int, error) {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err == unix.ENOENT {
		if err := makeNode(path, number); err != nil {
			return -1, err
		}
		fd, err = unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	}
	if err != nil {
		return -1, fmt.Errorf("open loop device %s: %w", path, err)
	}
	return fd, nil
}

func makeNode(path string, number int) error {
	// The minor is not the number when the module reserves partitions.
	major, minor := uint32(loopMajor), uint32(number)
	if text, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(path), "dev")); err == nil {
		if _, err := fmt.Sscanf(string(text), "%d:%d", &major, &minor); err != nil {
			return fmt.Errorf("parse device number of %s: %w", path, err)
		}
	}
	err := unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor)))
	if err != nil && err != unix.EEXIST {
		return fmt.Errorf("make device node %s: %w", path, err)
	}
	return nil
}

func (d *Device) configure(backing int, size int64) error {
	cfg := unix.LoopConfig{Fd: uint32(backing), Size: sectorSize}
	if size%blockSize == 0 {
		cfg.Size = blockSize
	}
	cfg.Info.Flags = unix.LO_FLAGS_READ_ONLY | unix.LO_FLAGS_AUTOCLEAR | unix.LO_FLAGS_DIRECT_IO
	copy(cfg.Info.File_name[:], "tatami")
	if err := unix.IoctlLoopConfigure(d.fd, &cfg); err != nil {
		return fmt.Errorf("configure %s: %w", d.Path, err)
	}
	info, err := unix.IoctlLoopGetStatus64(d.fd)
	if err != nil {
		return fmt.Errorf("read status of %s: %w", d.Path, err)
	}
	d.Direct = info.Flags&unix.LO_FLAGS_DIRECT_IO != 0
	return nil
}

// SetReadAhead sets how many bytes ahead the kernel reads of the device at
// path.
func SetReadAhead(path string, n int64) error {
	knob := filepath.Join("/sys/block", filepath.Base(path), "queue/read_ahead_kb")
	if err := os.WriteFile(knob, []byte(strconv.FormatInt(n/1024, 10)), 0); err != nil {
		return fmt.Errorf("set read-ahead of %s: %w", path, err)
	}
	return nil
}

// Close gives the descriptor back; without another user the device is free.
func (d *Device) Close() error { return unix.Close(d.fd) }

// Switch makes the device at path, which stays in use, read from another file
// of the same size, named by the descriptor backing. It waits for reads of the
// old file that are under way; later reads go to the new one alone. The new
// file's data should be on disk (fsync) before, or the switch waits for that.
func Switch(path string, backing int) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open loop device %s: %w", path, err)
	}
	defer func() { _ = unix.Close(fd) }()
	if err := unix.IoctlSetInt(fd, changeFD, backing); err != nil {
		return fmt.Errorf("switch %s to another file: %w", path, err)
	}
	return nil
}
