package shared

import (
	"fmt"
	"os"
	"sync/atomic"
	"unsafe"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Words of a state file, see the package comment.
const (
	wordMagic = iota
	wordVersion
	wordState
	wordEpoch
	wordCount
	wordSize
	header = 8
)

const (
	magic    = 0x0053494d41544154 // "TATAMIS\0" on a little-endian machine
	version  = 1
	wordLen  = 8 // bytes
	maxCount = 64 << 20
)

// States of word 2.
const (
	live uint64 = 1 + iota
	moved
	dead
)

func bitWords(n int) int { return (n + 63) / 64 }

// words is how many words the state file of n chunks has.
func words(n int) int { return header + 2*n + bitWords(n) }

// file is a state file in memory.
type file struct {
	mem         []byte
	head        []atomic.Uint64
	offs, ends  []atomic.Uint64 // in bytes, of chunks
	bits        []atomic.Uint64
	count       int   // of chunks, as it was when the file was mapped
	segmentSize int64 // likewise
}

// mapFile maps a state file. Its size is compared with what its header says first:
// memory behind the end of a file is SIGBUS.
func mapFile(f *os.File, prot int) (*file, error) {
	size, err := regularSize(f)
	if err != nil {
		return nil, err
	}
	if size < header*wordLen || size > int64(words(maxCount))*wordLen || size%wordLen != 0 {
		return nil, fmt.Errorf("state file of %d bytes: %w", size, errdefs.ErrDataLoss)
	}
	mem, err := mmap(f, int(size), prot)
	if err != nil {
		return nil, fmt.Errorf("map state file: %w", err)
	}
	m, err := parse(mem)
	if err != nil {
		_ = unix.Munmap(mem) // it was not used
		return nil, err
	}
	return m, nil
}

func wordsOf(mem []byte) []atomic.Uint64 {
	return unsafe.Slice((*atomic.Uint64)(unsafe.Pointer(unsafe.SliceData(mem))), len(mem)/wordLen)
}

// parse finds the parts of a state file.
func parse(mem []byte) (*file, error) {
	w := wordsOf(mem)
	count, size := w[wordCount].Load(), w[wordSize].Load()
	switch {
	case w[wordMagic].Load() != magic, w[wordVersion].Load() != version:
		return nil, fmt.Errorf("state file has an unknown magic or version: %w", errdefs.ErrDataLoss)
	case count > maxCount, words(int(count)) != len(w):
		return nil, fmt.Errorf("state file of %d bytes for %d chunks: %w", len(mem), count, errdefs.ErrDataLoss)
	case size > 1<<62:
		return nil, fmt.Errorf("state file of a segment of %d bytes: %w", size, errdefs.ErrDataLoss)
	}
	n := int(count)
	body := w[header:]
	return &file{mem: mem, head: w[:header], offs: body[:n], ends: body[n : 2*n], bits: body[2*n:], count: n, segmentSize: int64(size)}, nil
}

// end says that the file is of no use any more. The state comes first, so that
// whoever sees the old epoch behind it sees the new state.
func (m *file) end(state uint64) {
	m.head[wordState].Store(state)
	m.head[wordEpoch].Add(1)
}

func (m *file) unmap() error { return unix.Munmap(m.mem) }

func mmap(f *os.File, size, prot int) (mem []byte, err error) {
	conn, err := f.SyscallConn()
	if err != nil {
		return nil, err
	}
	cerr := conn.Control(func(fd uintptr) { mem, err = unix.Mmap(int(fd), 0, size, prot, unix.MAP_SHARED) })
	if cerr != nil {
		return nil, cerr
	}
	return mem, err
}

// regularSize is the size of a regular file in bytes.
func regularSize(f *os.File) (int64, error) {
	st, err := f.Stat()
	if err != nil {
		return 0, err
	}
	if !st.Mode().IsRegular() {
		return 0, fmt.Errorf("not a regular file (%v): %w", st.Mode().Type(), errdefs.ErrDataLoss)
	}
	return st.Size(), nil
}
