package session

import (
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// keptVersion is of the file that describes a session for the next supervisor.
const keptVersion = 1

// kept is what the next supervisor needs beside the descriptor of /dev/fuse.
type kept struct {
	Version int      `json:"version"`
	Dir     string   `json:"dir"`
	ID      string   `json:"id"`
	Mode    Mode     `json:"mode"`
	Offer   []byte   `json:"offer"`
	Workers int      `json:"workers"`           // that the session had so far
	Pending [][]byte `json:"pending,omitempty"` // Journal: requests without an answer, in their order
}

// Descriptor returns a duplicate of the session's /dev/fuse. As long as any
// process holds one, the session lives: whoever keeps it (a service manager's
// descriptor store) lets the next supervisor Resume it.
func (s *Session) Descriptor() (*os.File, error) {
	fd, err := unix.FcntlInt(s.fuse.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate /dev/fuse: %w", err)
	}
	return os.NewFile(uintptr(fd), "/dev/fuse"), nil
}

// Resume goes on with the session that an earlier supervisor left: fuse is its
// Descriptor, which is taken over, and file the Keep of that supervisor. A
// session that has ended meanwhile is ErrEnded, a file that does not describe
// one ErrDataLoss; then Open a new one.
func Resume(file string, fuse *os.File, log *slog.Logger) (*Session, error) {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	k, err := readKept(file)
	if err == nil {
		// The flag belongs to the open file, and the supervisor before may have
		// set it; see mountFuse.
		err = unix.SetNonblock(int(fuse.Fd()), false)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("resume session: %w", err), fuse.Close())
	}
	// The supervisor before wrote the file when it began. If it was killed, its
	// workers are not counted; it had one at least, which took requests along.
	workers := max(k.Workers, 1)
	s := &Session{dir: k.Dir, id: k.ID, mode: k.Mode, offer: k.Offer, fuse: fuse, log: log, workers: workers, pending: k.Pending}
	if s.Ended() {
		return nil, errors.Join(fmt.Errorf("resume session %s: %w", s.dir, ErrEnded), fuse.Close())
	}
	log.Info("FUSE session resumed", "dir", s.dir, "mode", s.mode, "workers", s.workers, "unanswered", len(s.pending))
	return s, nil
}

func readKept(file string) (*kept, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, err
	}
	k := new(kept)
	if err := json.Unmarshal(data, k); err != nil {
		return nil, fmt.Errorf("parse %s: %w: %w", file, err, errdefs.ErrDataLoss)
	}
	switch {
	case k.Version != keptVersion:
		return nil, fmt.Errorf("%s has version %d, this program writes %d: %w", file, k.Version, keptVersion, errdefs.ErrDataLoss)
	case !filepath.IsAbs(k.Dir) || k.ID == "" || k.Mode != Direct && k.Mode != Journal:
		return nil, fmt.Errorf("%s describes no session: %w", file, errdefs.ErrDataLoss)
	}
	for _, msg := range k.Pending {
		if _, err := parseHeader(msg); err != nil {
			return nil, fmt.Errorf("%s: %w: %w", file, err, errdefs.ErrDataLoss)
		}
	}
	return k, nil
}

// keep describes the session for the next supervisor, in one step.
func (s *Session) keep(file string) error {
	data, err := json.Marshal(kept{keptVersion, s.dir, s.id, s.mode, s.offer, s.workers, s.pending})
	if err == nil {
		err = os.WriteFile(file+".tmp", data, 0o600)
	}
	if err == nil {
		err = os.Rename(file+".tmp", file)
	}
	if err != nil {
		return fmt.Errorf("describe session %s for the next supervisor: %w", s.dir, err)
	}
	return nil
}

// leave lets go of the session without ending it.
func (s *Session) leave() error {
	s.closeOnce.Do(func() {
		s.closed.Store(true)
		s.closeErr = s.fuse.Close()
	})
	return s.closeErr
}
