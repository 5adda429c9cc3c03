package bundle

import (
	"errors"
	"fmt"
	"math"
	"runtime"

	"golang.org/x/sys/unix"
)

// maxUserFile bounds how much of a passwd or group file is read, in bytes.
const maxUserFile = 4 << 20

// readInRoot reads a regular file as the container would see it: symbolic
// links cannot lead out of root. A file that is not there is unix.ENOENT.
//
// The read may be answered by this very process. If that is killed meanwhile,
// the thread cannot die before the next worker answers, and a shared descriptor
// table would keep the locks and sockets that this worker needs. So the thread
// gets a table of its own and ends with it.
func readInRoot(root, path string) (data []byte, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// The main thread cannot end. While it is held here, another is used.
			defer runtime.UnlockOSThread()
			data, err = readInRoot(root, path)
			return
		}
		// Never unlocked, so that the thread ends with its table.
		if err = unix.CloseRange(3, math.MaxUint32, unix.CLOSE_RANGE_UNSHARE); err != nil {
			err = fmt.Errorf("separate descriptors: %w", err)
			return
		}
		data, err = readConfined(root, path)
	}()
	<-done
	return data, err
}

// readConfined uses raw descriptors: Go's poller is in the other table.
func readConfined(root, path string) ([]byte, error) {
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, path, &unix.OpenHow{
		// A FIFO in the place of the file must not block.
		Flags:   unix.O_RDONLY | unix.O_CLOEXEC | unix.O_NONBLOCK,
		Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, err
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return nil, unix.ENOENT
	}
	data := make([]byte, min(st.Size, maxUserFile))
	n := 0
	for n < len(data) {
		m, err := unix.Read(fd, data[n:])
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return nil, err
		}
		if m == 0 {
			break
		}
		n += m
	}
	return data[:n], nil
}
