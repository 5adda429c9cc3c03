package shared

import (
	"errors"
	"fmt"
	"os"
	"sort"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// Segment is a segment of a store in another process. Its methods may be called
// at the same time.
type Segment struct {
	data *os.File
	off  int64 // of the segment in data
	m    *file // its words are there until closed

	mu     sync.RWMutex // held while words are read
	closed bool         // protected by mu
}

// maxRun is how much one Map looks at before it is content, in bytes.
const maxRun = 1 << 20

// Open takes over the two descriptors of a share, also when it fails: the state
// file and the file that has the segment's bytes from off on. It fails with
// ErrDataLoss when they are not what the package comment says.
func Open(state, data *os.File, off int64) (*Segment, error) {
	m, err := mapFile(state, unix.PROT_READ)
	if err == nil {
		if err = errors.Join(m.checkTable(), m.checkData(data, off)); err != nil {
			err = errors.Join(err, m.unmap())
		}
	}
	err = errors.Join(err, state.Close())
	if err != nil {
		return nil, fmt.Errorf("open shared segment: %w", errors.Join(err, data.Close()))
	}
	return &Segment{data: data, off: off, m: m}, nil
}

// checkTable checks that chunks are in order and within the segment.
func (m *file) checkTable() error {
	last := uint64(0)
	for i := range m.offs {
		off, end := m.offs[i].Load(), m.ends[i].Load()
		if off < last || end <= off || end > uint64(m.segmentSize) {
			return fmt.Errorf("chunk %d at [%d, %d) of a segment of %d bytes: %w", i, off, end, m.segmentSize, errdefs.ErrDataLoss)
		}
		last = end
	}
	return nil
}

// checkData checks that the segment lies within the file of its bytes.
func (m *file) checkData(data *os.File, off int64) error {
	size, err := regularSize(data)
	if err != nil {
		return err
	}
	if off < 0 || off > size || m.segmentSize > size-off {
		return fmt.Errorf("segment of %d bytes at %d of a file of %d: %w", m.segmentSize, off, size, errdefs.ErrDataLoss)
	}
	return nil
}

// Size is the length of the segment in bytes.
func (s *Segment) Size() int64 { return s.m.segmentSize }

// Map says where the bytes from offset off of the segment on are: n of them from
// at on in f, if Valid(stamp) is true after they were read. n is 0 when the store
// has to be asked. Runs end after about 1 MiB. It does no I/O and takes no lock
// that is held for long; f is the Segment's own.
func (s *Segment) Map(off int64) (f *os.File, at, n int64, stamp uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed || off < 0 || off >= s.m.segmentSize {
		return nil, 0, 0, 0
	}
	stamp = s.m.head[wordEpoch].Load() // before the state and the bits
	if s.m.head[wordState].Load() != live {
		return nil, 0, 0, 0
	}
	n = s.m.runEnd(off) - off
	if n <= 0 {
		return nil, 0, 0, 0
	}
	return s.data, s.off + off, n, stamp
}

// runEnd returns where the bytes that are there from off on end, at most the
// segment's size. Table words are loaded once and bounded: who can write the file
// is another process.
func (m *file) runEnd(off int64) int64 {
	end := m.segmentSize
	first := sort.Search(m.count, func(i int) bool { return m.ends[i].Load() > uint64(off) })
	for i := first; i < m.count; i++ {
		next := m.offs[i].Load()
		if !m.has(i) || next >= uint64(off)+maxRun {
			return int64(min(next, uint64(end)))
		}
	}
	return end
}

func (m *file) has(i int) bool { return m.bits[i/64].Load()&(1<<(i%64)) != 0 }

// Valid says whether everything that Map gave with this stamp was there until
// now. After Close nothing is.
func (s *Segment) Valid(stamp uint64) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return !s.closed && s.m.head[wordEpoch].Load() == stamp
}

// Moved says whether the segment has another file now: Map gives nothing any more,
// and a new share does.
func (s *Segment) Moved() bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return !s.closed && s.m.head[wordState].Load() == moved
}

// Close gives back both descriptors. It is idempotent. Reads of the file that Map
// gave fail with [os.ErrClosed] from now on.
func (s *Segment) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil
	}
	s.closed = true
	return errors.Join(s.m.unmap(), s.data.Close())
}
