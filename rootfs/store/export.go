package store

import (
	"errors"
	"fmt"
	"os"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/store/shared"
)

// Share is what another process needs to read the present chunks of a segment: the
// arguments of [shared.Open]. Both descriptors are read-only and the caller's to
// close; copies of them may be passed on. They say nothing of chunks that are
// linked: those have to be asked for.
type Share struct {
	State *os.File
	Data  *os.File
	Off   int64 // of the segment in Data, in bytes
}

// Close closes both descriptors.
func (s *Share) Close() error { return errors.Join(s.State.Close(), s.Data.Close()) }

// Boot opens the file that holds the bytes before the first segment, all of
// them and no others. The descriptor is read-only and the caller's to close; the
// file never changes.
func (i *Image) Boot() (*os.File, error) {
	s := i.h.s
	s.mu.Lock()
	defer s.mu.Unlock()
	if !s.handles[i.h] {
		return nil, fmt.Errorf("open bootstrap: %w", i.h.errClosed())
	}
	f, err := reopen(i.image.boot)
	if err != nil {
		return nil, fmt.Errorf("open bootstrap of %s: %w", i.h.what, err)
	}
	return f, nil
}

// Share gives segment k of Segments to another process, for as long as the segment
// is open; afterwards that process reads nothing wrong, but finds that nothing is
// there any more. What is open when the store is closed, or its process ends by a
// signal, can be read on until the store is opened again, because nothing goes
// meanwhile. There is one state file for all shares of a segment. Share fails with
// ErrFailedPrecondition when the store keeps nothing, or the segment lies in the file of
// another image, all of which that process could read, with ErrInvalidArgument when
// there is no such segment, and with ErrResourceExhausted when the disk is full.
func (i *Image) Share(k int) (*Share, error) {
	g, err := i.hold(k)
	if err != nil {
		return nil, fmt.Errorf("share segment %d of %s: %w", k, i.h.what, err)
	}
	defer i.h.s.release(g)
	out, err := g.export(i.h.s.dir.image(i.Manifest(), wholeFile))
	if err != nil {
		return nil, fmt.Errorf("share segment %d of %s: %w", k, i.h.what, err)
	}
	i.h.views[k].noteAll()
	return out, nil
}

// EndShares ends what an open image shares: readers have to ask again. It does
// nothing of an image that is not open.
func (s *Store) EndShares(manifest digest.Digest) {
	s.mu.Lock()
	var held []*segment
	if i := s.images[manifest]; i != nil {
		held = slices.Clone(i.segments)
	}
	for _, g := range held {
		g.refs++
	}
	s.mu.Unlock()
	for _, g := range held {
		g.endShares()
		s.release(g)
	}
}

func (g *segment) endShares() {
	g.flushMu.Lock()
	defer g.flushMu.Unlock()
	g.mu.Lock()
	st := g.takeState((*shared.State).Move)
	g.mu.Unlock()
	g.closeState(st)
}

// hold opens segment k once more; the caller releases it.
func (i *Image) hold(k int) (*segment, error) {
	s := i.h.s
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case !s.handles[i.h]:
		return nil, os.ErrClosed
	case !s.cfg.Keep:
		return nil, fmt.Errorf("the store keeps nothing: %w", errdefs.ErrFailedPrecondition)
	case k < 0 || k >= len(i.image.segments):
		return nil, fmt.Errorf("there are %d: %w", len(i.image.segments), errdefs.ErrInvalidArgument)
	}
	g := i.image.segments[k]
	g.refs++
	return g, nil
}

// export does Share's work for an image, whose complete file is called whole.
// Precondition: the segment has a home and stays open.
func (g *segment) export(whole string) (*Share, error) {
	g.flushMu.Lock() // its home and its state file stay meanwhile
	defer g.flushMu.Unlock()
	if h := g.home.Load(); !h.own && !sameFile(h.file, whole) {
		return nil, fmt.Errorf("it lies in another image's file: %w", errdefs.ErrFailedPrecondition)
	}
	if err := g.openState(); err != nil {
		return nil, err
	}
	state, err := g.state.Open()
	if err != nil {
		return nil, err
	}
	h := g.home.Load()
	data, err := reopen(h.file)
	if err != nil {
		return nil, errors.Join(err, state.Close())
	}
	return &Share{State: state, Data: data, Off: h.off}, nil
}

// openState makes the segment's state file unless there is one. Precondition:
// flushMu is held.
func (g *segment) openState() error {
	if g.state != nil {
		return nil
	}
	chunks := make([]shared.Extent, len(g.table.Chunks))
	for i, c := range g.table.Chunks {
		chunks[i] = shared.Extent{Off: c.Off, End: c.End()}
	}
	st, err := shared.Create(g.s.dir.shared(), g.id.Encoded(), g.table.Size, chunks)
	if err != nil {
		return err
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	for i := range chunks {
		if g.owns(i) {
			st.Set(i)
		}
	}
	g.state = st
	return nil
}

// reopen opens a file read-only and apart from f: a copy of f's descriptor would
// share its flags with the process that gets it.
func reopen(f *os.File) (out *os.File, err error) {
	conn, err := f.SyscallConn() // holds f open
	if err != nil {
		return nil, err
	}
	cerr := conn.Control(func(fd uintptr) { out, err = os.Open(fmt.Sprintf("/proc/self/fd/%d", fd)) })
	return out, errors.Join(cerr, err)
}
