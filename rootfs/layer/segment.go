package layer

import (
	"bytes"
	"crypto/sha256"
	"fmt"
	"hash/fnv"
	"io"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// ZeroWriter is what a segment's writer may implement to be spared from runs of
// zeros: WriteZeros(n) means the same as writing n zero bytes. Runs can be
// longer than any disk (sparse files).
type ZeroWriter interface {
	WriteZeros(n int64) error
}

// Discard is a segment's writer for those who want only its table.
var Discard io.Writer = nowhere{}

type nowhere struct{}

func (nowhere) Write(p []byte) (int, error) { return len(p), nil }
func (nowhere) WriteZeros(int64) error      { return nil }

// segment cuts what is written to it into chunks and passes them on. Stretches
// of zeros get no chunk.
//
// The cuts are such that files which two layers have in common make the same
// chunks in both, wherever they lie. A file of index.UnitSize or more is cut
// for itself, in units from its start. Smaller ones are gathered into a chunk
// of up to a unit, which ends where a file begins: at one that does not fit, or
// when there is enough of it already and the file's path says so. Where files
// differ the chunks do too, but by their paths the next cuts come together
// again.
type segment struct {
	w      io.Writer
	zeros  ZeroWriter    // nil if w is none
	worker *sched.Worker // who writes, and waits for w
	table  index.Table

	large      bool // the chunk is part of a file that is cut for itself
	n          int  // bytes in unit
	unit, zero []byte
}

// A gathered chunk ends at one in endShare of the files that begin when it has
// minGather bytes. With files as images have them chunks get some 40 KiB long.
const (
	minGather = 16 << 10
	endShare  = 4
)

func newSegment(w io.Writer, worker *sched.Worker) *segment {
	z, _ := w.(ZeroWriter)
	return &segment{w: worker.Writer(w), zeros: z, worker: worker, unit: make([]byte, index.UnitSize), zero: make([]byte, index.UnitSize)}
}

// Begin implements tarball.Segment: it decides whether a chunk ends here.
func (s *segment) Begin(path string, size int64) error {
	full := s.large || size >= index.UnitSize || int64(s.n)+index.RoundUp(size) > index.UnitSize
	s.large = size >= index.UnitSize
	if s.n > 0 && (full || s.n >= minGather && endsAt(path)) {
		return s.flush()
	}
	return nil
}

// endsAt says whether a chunk is to end at a file. Changing it makes all
// segments new.
func endsAt(path string) bool {
	h := fnv.New32a()
	_, _ = io.WriteString(h, path) // never fails
	return h.Sum32()%endShare == 0
}

// ReadFrom implements tarball.Segment; bytes go from r straight into the unit.
func (s *segment) ReadFrom(r io.Reader) (int64, error) {
	total := int64(0)
	for {
		n, err := r.Read(s.unit[s.n:])
		s.n += n
		total += int64(n)
		if flushErr := s.flushFull(); flushErr != nil {
			return total, flushErr
		}
		if err == io.EOF {
			return total, nil
		}
		if err != nil {
			return total, err
		}
	}
}

// WriteZeros implements tarball.Segment.
func (s *segment) WriteZeros(n int64) error {
	for n > 0 {
		if s.n == 0 && n >= index.UnitSize {
			whole := n - n%index.UnitSize
			if err := s.skip(whole); err != nil {
				return err
			}
			n -= whole
			continue
		}
		k := min(n, int64(len(s.unit)-s.n))
		clear(s.unit[s.n : s.n+int(k)])
		s.n += int(k)
		n -= k
		if err := s.flushFull(); err != nil {
			return err
		}
	}
	return nil
}

func (s *segment) flushFull() error {
	if s.n < len(s.unit) {
		return nil
	}
	return s.flush()
}

// flush ends the current chunk, if there is one.
func (s *segment) flush() error {
	b := s.unit[:s.n]
	s.n = 0
	if bytes.Equal(b, s.zero[:len(b)]) {
		return s.skip(int64(len(b)))
	}
	s.table.Chunks = append(s.table.Chunks, index.Chunk{
		Off: s.table.Size, Len: int64(len(b)), Sum: sha256.Sum256(b),
	})
	s.table.Size += int64(len(b))
	if _, err := s.w.Write(b); err != nil {
		return fmt.Errorf("write segment: %w", err)
	}
	return nil
}

// skip passes on n zeros.
func (s *segment) skip(n int64) error {
	s.table.Size += n
	if s.zeros != nil && n > 0 {
		if err := s.worker.Wait(func() error { return s.zeros.WriteZeros(n) }); err != nil {
			return fmt.Errorf("write segment: %w", err)
		}
		return nil
	}
	for n > 0 {
		k := min(n, int64(len(s.zero)))
		if _, err := s.w.Write(s.zero[:k]); err != nil {
			return fmt.Errorf("write segment: %w", err)
		}
		n -= k
	}
	return nil
}
