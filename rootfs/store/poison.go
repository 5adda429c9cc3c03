package store

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// maxReason bounds a .poison file, in bytes.
const maxReason = 4 << 10

// Poison makes every later read of the segment fail with ErrDataLoss and the
// reason, in all handles and after a restart, until the segment is removed: what
// it holds is what its table says, and was found not to be what the image means
// (the layer has another diffID). The first call writes it to the log. A complete
// file that Materialize has made is not under the store's control. It fails with
// ErrNotFound when the store does not have the segment.
func (s *Store) Poison(id index.ID, reason error) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return fmt.Errorf("poison segment %s: %w", id, os.ErrClosed)
	}
	g := s.segments[id]
	if g == nil && !s.hasAny(id, tableFile, dataFile, homeFile) {
		return fmt.Errorf("poison segment %s: %w", id, errdefs.ErrNotFound)
	}
	if known, err := s.poisoned(id); known != nil || err != nil {
		return err
	}
	if g != nil {
		err := poison(id, reason.Error())
		g.poison.Store(&err)
	}
	s.log.Error("segment is poisoned; its images cannot be read", "segment", id, "reason", reason)
	text := reason.Error()
	if err := s.dir.write(s.dir.segment(id, poisonFile), []byte(text[:min(len(text), maxReason)])); err != nil {
		return fmt.Errorf("poison segment %s beyond a restart: %w", id, err)
	}
	return nil
}

// poisoned returns the error that reads of the segment fail with, known, or nil
// when it is not poisoned. What a .poison file says does not matter for that.
func (s *Store) poisoned(id index.ID) (known, err error) {
	f, err := os.Open(s.dir.segment(id, poisonFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	defer f.Close() // only read
	reason, err := io.ReadAll(io.LimitReader(f, maxReason))
	if err != nil {
		return nil, err
	}
	return poison(id, string(reason)), nil
}

func poison(id index.ID, reason string) error {
	return fmt.Errorf("segment %s is poisoned, remove its images and pull them again: %s: %w", id, reason, errdefs.ErrDataLoss)
}

// usable fails when the segment is poisoned. It takes no lock.
func (g *segment) usable() error {
	if err := g.poison.Load(); err != nil {
		return *err
	}
	return nil
}
