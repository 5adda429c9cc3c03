// Package thread runs code on a thread that has a descriptor table of its own.
//
// It is for a process that answers FUSE requests and also makes some. If it is
// killed while one of its threads waits for an answer, that thread cannot die
// before somebody answers, and its table stays open meanwhile: /dev/fuse, so
// that the session would not even end with everybody who serves it, and every
// socket by which others notice the death. With a private table all that is
// closed although the thread still waits.
//
// The Go runtime may use its poller on any thread, so the poller's descriptors
// stay open in a private table; it must exist before, which it does as soon as
// the process has opened a file that can be waited for.
package thread

import (
	"fmt"
	"runtime"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"
)

// Isolated runs f on a thread of its own and returns its error. f must use raw
// descriptors (no os.File) that it opened itself; those left open are closed
// with the thread.
func Isolated(f func() error) error {
	result := make(chan error, 1)
	go func() {
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end, and its table is what /proc shows of
			// the process. While it is held here, f gets another.
			defer runtime.UnlockOSThread()
			result <- Isolated(f)
			return
		}
		// Never unlocked: the thread ends with its table.
		if err := unshareFiles(); err != nil {
			result <- err
			return
		}
		result <- f()
	}()
	return <-result
}

// Hold moves the descriptor fd, a socket, to a thread that does nothing else
// until the other end is closed. When the process is killed the socket closes
// at once, whatever other threads wait for. The thread has no owner: it lives
// as long as the process or the other end.
func Hold(fd int) error {
	ready := make(chan error, 1)
	go hold(fd, ready)
	if err := <-ready; err != nil {
		return err
	}
	return unix.Close(fd)
}

func hold(fd int, ready chan<- error) {
	runtime.LockOSThread()
	if unix.Gettid() == unix.Getpid() {
		defer runtime.UnlockOSThread()
		other := make(chan error, 1)
		go hold(fd, other)
		ready <- <-other
		return
	}
	err := unshareFiles(fd)
	ready <- err
	if err != nil {
		return
	}
	var b [1]byte
	for {
		if _, err := unix.Read(fd, b[:]); err != unix.EINTR {
			return
		}
	}
}

// firstPrivate is the first descriptor that may be closed: standard input,
// output and error stay.
const firstPrivate = 3

// unshareFiles gives the calling thread a table of its own and closes in it
// everything but keep, the standard descriptors, and the runtime's poller.
func unshareFiles(keep ...int) error {
	if err := unix.Unshare(unix.CLONE_FILES); err != nil {
		return fmt.Errorf("unshare descriptors: %w", err)
	}
	open, err := openFiles()
	if err != nil {
		return fmt.Errorf("list descriptors: %w", err)
	}
	for _, fd := range open {
		if fd >= firstPrivate && !slices.Contains(keep, fd) && !isPoller(fd) {
			_ = unix.Close(fd) // the one that listed them is closed already
		}
	}
	return nil
}

const filesDir = "/proc/thread-self/fd"

// openFiles lists the descriptors of the calling thread.
func openFiles() ([]int, error) {
	dir, err := unix.Open(filesDir, unix.O_RDONLY|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Close(dir) }()
	var names []string
	buf := make([]byte, 8192)
	for {
		n, err := unix.ReadDirent(dir, buf)
		if err != nil {
			return nil, err
		}
		if n == 0 {
			break
		}
		_, _, names = unix.ParseDirent(buf[:n], -1, names)
	}
	var open []int
	for _, name := range names {
		if fd, err := strconv.Atoi(name); err == nil {
			open = append(open, fd)
		}
	}
	return open, nil
}

// isPoller tells whether a descriptor is of the kinds that the Go runtime
// waits with. Others of these kinds hold nothing open.
func isPoller(fd int) bool {
	buf := make([]byte, 64)
	n, err := unix.Readlink(filesDir+"/"+strconv.Itoa(fd), buf)
	if err != nil {
		return false
	}
	switch string(buf[:n]) {
	case "anon_inode:[eventpoll]", "anon_inode:[eventfd]":
		return true
	}
	return false
}
