package shared

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Extent is where a chunk lies in its segment: bytes [Off, End).
type Extent struct{ Off, End int64 }

// State is a state file as its one writer has it. It holds memory and a name, but
// no descriptor. Set, Clear, Bump and the ends are for one goroutine at a time;
// readers in other processes see each of them at once.
type State struct {
	name string
	m    *file
}

// Create makes a state file in dir for a live segment of size bytes, with no
// chunk there yet. Its name begins with stem. Chunks are in the order of their
// offsets, do not overlap and lie within the segment. The whole file is written
// before it is mapped, so that a full disk is an error here and not a signal
// later (a filesystem that never writes in place can still be full then).
func Create(dir, stem string, size int64, chunks []Extent) (*State, error) {
	f, err := os.CreateTemp(dir, stem+".")
	if err != nil {
		return nil, fmt.Errorf("create state file: %w", err)
	}
	m, err := fill(f, size, chunks)
	if err = errors.Join(err, f.Close()); err != nil {
		_ = os.Remove(f.Name()) // the next Retire finds it
		if errors.Is(err, unix.ENOSPC) {
			err = errors.Join(errdefs.ErrResourceExhausted, err)
		}
		return nil, fmt.Errorf("create state file: %w", err)
	}
	return &State{name: f.Name(), m: m}, nil
}

func fill(f *os.File, size int64, chunks []Extent) (*file, error) {
	w := make([]uint64, words(len(chunks)))
	w[wordMagic], w[wordVersion], w[wordState] = magic, version, live
	w[wordCount], w[wordSize] = uint64(len(chunks)), uint64(size)
	for i, c := range chunks {
		w[header+i], w[header+len(chunks)+i] = uint64(c.Off), uint64(c.End)
	}
	if _, err := f.Write(unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(w))), len(w)*wordLen)); err != nil {
		return nil, err
	}
	return mapFile(f, unix.PROT_READ|unix.PROT_WRITE)
}

// Open returns a descriptor for a reader: read-only, and of its own, so that what
// the reader does with it is seen by nobody else.
func (s *State) Open() (*os.File, error) { return os.Open(s.name) }

// Set says that chunk i is there. Its bytes are in the file already.
func (s *State) Set(i int) { s.m.bits[i/64].Or(1 << (i % 64)) }

// Clear takes a chunk back. Bump has to follow before its bytes may go.
func (s *State) Clear(i int) { s.m.bits[i/64].And(^uint64(1 << (i % 64))) }

// Bump tells the readers of this moment to look again.
func (s *State) Bump() { s.m.head[wordEpoch].Add(1) }

// Move says that the segment has another file now: readers may ask for it.
func (s *State) Move() { s.m.end(moved) }

// Kill says that nothing is to be read here any more.
func (s *State) Kill() { s.m.end(dead) }

// Close removes the file, after Move or Kill. Readers keep what they have mapped.
func (s *State) Close() error {
	err := errors.Join(s.m.unmap(), os.Remove(s.name))
	s.m = nil
	return err
}

// Leave forgets the file, which stays as it is for the readers of this moment, until
// the next Retire: none of the bytes that it speaks of may go before that.
func (s *State) Leave() error {
	err := s.m.unmap()
	s.m = nil
	return err
}

// Retire kills and removes the state files that an earlier process has left in
// dir. When it fails, readers may still rely on one of them: nothing may be taken
// out of the files that they read.
func Retire(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := retire(filepath.Join(dir, e.Name())); err != nil {
			return fmt.Errorf("retire state file: %w", err)
		}
	}
	return nil
}

// retire kills and removes one file, of any version: who reads it may be of that one.
// One without a head was never given to a reader.
func retire(name string) error {
	f, err := os.OpenFile(name, os.O_RDWR|unix.O_NOFOLLOW, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err = errors.Join(killHead(f), f.Close()); err != nil {
		return err
	}
	return os.Remove(name)
}

// killHead kills the state file f if it is one.
func killHead(f *os.File) error {
	size, err := regularSize(f)
	if errdefs.IsDataLoss(err) || err == nil && size < header*wordLen {
		return nil
	}
	if err != nil {
		return err
	}
	mem, err := mmap(f, header*wordLen, unix.PROT_READ|unix.PROT_WRITE)
	if err != nil {
		return fmt.Errorf("map head: %w", err)
	}
	m := &file{mem: mem, head: wordsOf(mem)}
	if m.head[wordMagic].Load() == magic { // else nothing is written: there may be no room for it
		m.end(dead)
	}
	return m.unmap()
}
