package kata

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// watchMask is what changes a directory's list of names, or takes it away.
const watchMask = unix.IN_CREATE | unix.IN_DELETE | unix.IN_MOVED_FROM | unix.IN_MOVED_TO |
	unix.IN_DELETE_SELF | unix.IN_MOVE_SELF | unix.IN_ONLYDIR

// eventBytes is how many bytes of inotify events are read at a time.
const eventBytes = 64 << 10

// notifier says that something may have changed in directories; what, is for
// the reader of the directories to find out. It may miss changes (limits of
// the kernel), and so never stands in for looking.
type notifier struct {
	file  *os.File      // inotify(7)
	hints chan struct{} // has an element after a change
	wg    sync.WaitGroup

	mu      sync.Mutex
	watches map[int32]*watched // by watch descriptor; protected by mu
	paths   map[string]int32   // protected by mu
}

// watched is one directory.
type watched struct {
	path  string
	names map[string]bool // those that count; all when nil
}

func newNotifier() (*notifier, error) {
	fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("watch directories: %w", err)
	}
	n := &notifier{
		file: os.NewFile(uintptr(fd), "inotify"), hints: make(chan struct{}, 1),
		watches: map[int32]*watched{}, paths: map[string]int32{},
	}
	n.wg.Go(n.read)
	return n, nil
}

// close ends the notifier. It has no error that matters.
func (n *notifier) close() {
	_ = n.file.Close() // nothing was written
	n.wg.Wait()
}

// set makes want the directories that are watched: by path, the names that
// count in it, nil for all. The error is that of directories that cannot be
// watched; those that do not exist are none.
func (n *notifier) set(want map[string]map[string]bool) error {
	conn, err := n.file.SyscallConn()
	if err != nil {
		return err
	}
	cerr := conn.Control(func(fd uintptr) { err = n.update(int(fd), want) })
	return errors.Join(cerr, err)
}

func (n *notifier) update(fd int, want map[string]map[string]bool) error {
	n.mu.Lock()
	defer n.mu.Unlock()
	for path, wd := range n.paths {
		if _, ok := want[path]; !ok {
			_, _ = unix.InotifyRmWatch(fd, uint32(wd)) // gone by itself, perhaps
			n.forget(wd)
		}
	}
	var errs []error
	for path, names := range want {
		if wd, ok := n.paths[path]; ok {
			n.watches[wd].names = names
			continue
		}
		wd, err := unix.InotifyAddWatch(fd, path, watchMask)
		switch {
		case errors.Is(err, unix.ENOENT), errors.Is(err, unix.ENOTDIR):
		case err != nil:
			errs = append(errs, fmt.Errorf("watch %s: %w", path, err))
		default:
			n.forget(int32(wd)) // another name of the same directory
			n.watches[int32(wd)] = &watched{path, names}
			n.paths[path] = int32(wd)
		}
	}
	return errors.Join(errs...)
}

// forget drops what is known of a watch. Precondition: n.mu is held.
func (n *notifier) forget(wd int32) {
	if w := n.watches[wd]; w != nil {
		delete(n.watches, wd)
		delete(n.paths, w.path)
	}
}

// read turns events into hints until the file is closed.
func (n *notifier) read() {
	buf := make([]byte, eventBytes)
	for {
		m, err := n.file.Read(buf)
		if err != nil {
			return
		}
		if n.counts(buf[:m]) {
			select {
			case n.hints <- struct{}{}:
			default: // one is waiting
			}
		}
	}
}

// counts says whether one of the events is about a name that counts, and
// forgets the watches that the kernel has ended.
func (n *notifier) counts(events []byte) bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	found := false
	for len(events) >= unix.SizeofInotifyEvent {
		wd := int32(binary.NativeEndian.Uint32(events))
		mask := binary.NativeEndian.Uint32(events[4:])
		size := int(binary.NativeEndian.Uint32(events[12:]))
		events = events[unix.SizeofInotifyEvent:]
		name := unix.ByteSliceToString(events[:min(size, len(events))])
		events = events[min(size, len(events)):]
		w := n.watches[wd]
		found = found || mask&unix.IN_Q_OVERFLOW != 0 || w != nil && (name == "" || w.names == nil || w.names[name])
		if mask&(unix.IN_IGNORED|unix.IN_MOVE_SELF) != 0 {
			n.forget(wd)
		}
	}
	return found
}

// nearest is the closest existing directory to path, path itself or one above,
// and the name in it that leads on to path; "" when path exists.
func nearest(path string) (dir, name string) {
	for dir = path; ; dir = filepath.Dir(dir) {
		if st, err := os.Stat(dir); err == nil && st.IsDir() || dir == filepath.Dir(dir) {
			return dir, name
		}
		name = filepath.Base(dir)
	}
}
