package session

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/mount/thread"
)

// environment variable that tells a worker what it inherits.
const handoverEnv = "TATAMI_SESSION"

// handover is the content of handoverEnv. Descriptors count from firstFD in
// the order fuse, lifeline, journal (only with Journal), extras.
type handover struct {
	Dir      string
	ID       string
	Mode     Mode
	Offer    []byte
	Restarts int
	Extra    []string // names, for messages
}

const firstFD = 3

// Link is a worker's end of a session. Receive is for one goroutine, Reply for
// any number.
type Link struct {
	handover
	fuse    *os.File
	journal *os.File   // nil with Direct
	extra   []*os.File // as given to the supervisor
}

// Inherited says whether a supervisor started this process as its worker.
func Inherited() bool {
	_, ok := os.LookupEnv(handoverEnv)
	return ok
}

// Inherit takes over what the supervisor of this process left it. Call it once
// and early: the descriptors must not leak into other children.
func Inherit() (*Link, error) {
	v, ok := os.LookupEnv(handoverEnv)
	if !ok {
		return nil, fmt.Errorf("no %s in the environment: a worker is started by its supervisor only: %w", handoverEnv, errdefs.ErrFailedPrecondition)
	}
	if err := os.Unsetenv(handoverEnv); err != nil {
		return nil, fmt.Errorf("unset %s: %w", handoverEnv, err)
	}
	var h handover
	if err := json.Unmarshal([]byte(v), &h); err != nil {
		return nil, fmt.Errorf("parse %s: %w", handoverEnv, err)
	}
	next := firstFD + 2
	journal := -1
	if h.Mode == Journal {
		journal = next
		next++
	}
	for fd := firstFD; fd < next+len(h.Extra); fd++ {
		unix.CloseOnExec(fd)
	}
	l, err := newLink(h, firstFD, journal)
	if err != nil {
		return nil, err
	}
	for i, name := range h.Extra {
		l.extra = append(l.extra, os.NewFile(uintptr(next+i), name))
	}
	// A thread that waits for an answer from this very process must not keep
	// the supervisor from noticing that the process was killed.
	return l, thread.Hold(firstFD + 1)
}

func newLink(h handover, fuse, journal int) (*Link, error) {
	l := &Link{handover: h}
	// The flag belongs to the open file, which the supervisor shares; it does
	// not read there (Direct) or wants it too (Journal).
	if err := unix.SetNonblock(fuse, true); err != nil {
		return nil, fmt.Errorf("prepare /dev/fuse (descriptor %d): %w", fuse, err)
	}
	l.fuse = os.NewFile(uintptr(fuse), "/dev/fuse")
	if journal >= 0 {
		if err := unix.SetNonblock(journal, true); err != nil {
			return nil, fmt.Errorf("prepare journal (descriptor %d): %w", journal, err)
		}
		l.journal = os.NewFile(uintptr(journal), "journal")
	}
	return l, nil
}

// Dir is where the session's files appear.
func (l *Link) Dir() string { return l.handover.Dir }

// ID names the session. Records of another session describe mounts that are
// dead.
func (l *Link) ID() string { return l.handover.ID }

// Offer is the kernel's INIT request as it came.
func (l *Link) Offer() []byte { return l.handover.Offer }

// Restarts is how many workers this session had before.
func (l *Link) Restarts() int { return l.handover.Restarts }

// Extra are the files that the supervisor passed on (listening sockets), in
// its order.
func (l *Link) Extra() []*os.File { return l.extra }

// Receive reads the next request into buf, which holds at least BufferSize
// bytes. It returns ErrEnded when there will be none, and an error that
// matches os.ErrDeadlineExceeded after Stop.
func (l *Link) Receive(buf []byte) (int, error) {
	src := l.fuse
	if l.journal != nil {
		src = l.journal
	}
	for {
		n, err := src.Read(buf)
		switch {
		case err == nil:
			return n, nil
		case errors.Is(err, unix.ENOENT): // the request was aborted while it was read
		case errors.Is(err, unix.ENODEV), errors.Is(err, unix.ECONNABORTED), errors.Is(err, io.EOF):
			return 0, ErrEnded
		default:
			return 0, fmt.Errorf("receive request: %w", err)
		}
	}
}

// Stop makes Receive return.
func (l *Link) Stop() {
	src := l.fuse
	if l.journal != nil {
		src = l.journal
	}
	// Cannot fail for a descriptor that is in the poller.
	_ = src.SetReadDeadline(time.Unix(1, 0))
}

// Reply sends the answer to the request that unique names: head, which starts
// with the reply header, then payload. An answer that nobody waits for any
// more (interrupted, or given twice) is no error.
func (l *Link) Reply(unique uint64, head, payload []byte) error {
	err := l.answer(head, payload)
	if l.journal == nil || err != nil {
		return err
	}
	var ack [8]byte
	binary.NativeEndian.PutUint64(ack[:], unique)
	if _, err := l.journal.Write(ack[:]); err != nil {
		return fmt.Errorf("acknowledge request: %w", err)
	}
	return nil
}

func (l *Link) answer(head, payload []byte) error {
	// Writes to /dev/fuse never wait, so the plain system call will do.
	var err error
	if len(payload) == 0 {
		_, err = unix.Write(int(l.fuse.Fd()), head)
	} else {
		_, err = unix.Writev(int(l.fuse.Fd()), [][]byte{head, payload})
	}
	switch err {
	case nil, unix.ENOENT:
		return nil
	case unix.ENODEV, unix.ECONNABORTED:
		return ErrEnded
	}
	return fmt.Errorf("answer request: %w", err)
}

// Close gives the worker's descriptors back. The session lives on.
func (l *Link) Close() error {
	err := l.fuse.Close()
	if l.journal != nil {
		err = errors.Join(err, l.journal.Close())
	}
	return err
}
