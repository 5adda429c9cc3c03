package shared_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/store/shared"
)

const block = 4096

// Chunks of the tests: padding behind the second, a gap behind the third.
var (
	extents = []shared.Extent{{Off: 0, End: block}, {Off: block, End: 2*block - 100}, {Off: 2 * block, End: 3 * block}, {Off: 8 * block, End: 9 * block}}
	size    = int64(10 * block)
)

func check(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// create makes a state file whose chunks are not there yet.
func create(t testing.TB) *shared.State {
	t.Helper()
	st, err := shared.Create(t.TempDir(), "stem", size, extents)
	check(t, err)
	return st
}

// open opens the state like another process, with a data file that has the segment
// at offset off.
func open(t testing.TB, st *shared.State, off int64) *shared.Segment {
	t.Helper()
	f, err := st.Open()
	check(t, err)
	s, err := shared.Open(f, dataFile(t, off+size), off)
	check(t, err)
	t.Cleanup(func() { check(t, s.Close()) })
	return s
}

func dataFile(t testing.TB, n int64) *os.File {
	t.Helper()
	f := memoryFile(t)
	check(t, f.Truncate(n))
	return f
}

func memoryFile(t testing.TB) *os.File {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC)
	check(t, err)
	return os.NewFile(uintptr(fd), "test")
}

func TestMap(t *testing.T) {
	st := create(t)
	const base = 7 * block
	s := open(t, st, base)
	for _, c := range []struct {
		set    []int
		off, n int64
	}{
		{nil, 0, 0}, {nil, block, 0}, {nil, 2*block - 100, 100}, {nil, 2*block - 1, 1}, {nil, 3 * block, 5 * block},
		{nil, 9 * block, block}, {nil, size - 1, 1}, {nil, size, 0}, {nil, size + 1, 0}, {nil, -1, 0}, {nil, 1<<63 - 1, 0},
		{[]int{1}, 0, 0}, {nil, block, block}, {nil, block + 5, block - 5}, {nil, 2 * block, 0},
		{[]int{0, 2}, 0, 8 * block}, {nil, 8 * block, 0}, {nil, 9*block - 1, 0},
		{[]int{3}, 0, size}, {nil, 8*block + 1, 2*block - 1},
	} {
		for _, i := range c.set {
			st.Set(i)
		}
		f, at, n, stamp := s.Map(c.off)
		if n != c.n || n > 0 && (f == nil || at != base+c.off || !s.Valid(stamp)) {
			t.Errorf("at %d: %d bytes at %d, want %d", c.off, n, at, c.n)
		}
	}
	if s.Size() != size || s.Moved() {
		t.Errorf("size %d, moved %v", s.Size(), s.Moved())
	}
}

// A long run of chunks ends soon after maxRun, at a chunk's start.
func TestMapRun(t *testing.T) {
	var chunks []shared.Extent
	for off := int64(0); off < 4<<20; off += block {
		chunks = append(chunks, shared.Extent{Off: off, End: off + block})
	}
	st, err := shared.Create(t.TempDir(), "stem", 4<<20, chunks)
	check(t, err)
	for i := range chunks {
		st.Set(i)
	}
	f, err := st.Open()
	check(t, err)
	s, err := shared.Open(f, dataFile(t, 4<<20), 0)
	check(t, err)
	defer s.Close()
	if _, _, n, _ := s.Map(block + 1); n != 1<<20+block-1 {
		t.Errorf("%d bytes", n)
	}
	if _, _, n, _ := s.Map(4<<20 - 5); n != 5 {
		t.Errorf("%d bytes at the end", n)
	}
}

// What goes takes every stamp with it that was given before.
func TestStamps(t *testing.T) {
	for name, c := range map[string]struct {
		do    func(*shared.State)
		valid bool
		gives bool // afterwards
		moved bool
	}{
		"set":            {func(st *shared.State) { st.Set(1) }, true, true, false},
		"another goes":   {func(st *shared.State) { st.Clear(3); st.Bump() }, false, true, false},
		"it goes":        {func(st *shared.State) { st.Clear(0); st.Bump() }, false, false, false},
		"goes and comes": {func(st *shared.State) { st.Clear(0); st.Bump(); st.Set(0) }, false, true, false},
		"moved":          {(*shared.State).Move, false, false, true},
		"dead":           {(*shared.State).Kill, false, false, false},
	} {
		t.Run(name, func(t *testing.T) {
			st := create(t)
			s := open(t, st, 0)
			st.Set(0)
			st.Set(3)
			_, _, n, stamp := s.Map(0)
			if n == 0 || !s.Valid(stamp) {
				t.Fatalf("%d bytes", n)
			}
			c.do(st)
			_, _, n, next := s.Map(0)
			if s.Valid(stamp) != c.valid || (n > 0) != c.gives || n > 0 && !s.Valid(next) || s.Moved() != c.moved {
				t.Errorf("valid %v, %d bytes, moved %v", s.Valid(stamp), n, s.Moved())
			}
			check(t, st.Close())
			if s.Valid(stamp) != c.valid {
				t.Error("validity changed with the removal of the file")
			}
		})
	}
}

// After Close nothing is valid, also for goroutines that are at work.
func TestCloseUnderReaders(t *testing.T) {
	for range 200 {
		st := create(t)
		st.Set(0)
		s := open(t, st, 0)
		var wg sync.WaitGroup
		for range 2 {
			wg.Go(func() {
				for {
					f, at, n, stamp := s.Map(0)
					if n == 0 {
						return
					}
					if _, err := f.ReadAt(make([]byte, 10), at); err != nil && !errors.Is(err, os.ErrClosed) {
						t.Error(err)
					}
					s.Valid(stamp)
					s.Moved()
				}
			})
		}
		check(t, s.Close())
		wg.Wait()
		check(t, st.Close())
		if s.Valid(0) || s.Moved() || s.Size() != size {
			t.Error("valid when closed")
		}
	}
}

func TestRetire(t *testing.T) {
	dir := t.TempDir()
	st, err := shared.Create(dir, "a", size, extents)
	check(t, err)
	st.Set(0)
	s := open(t, st, 0)
	_, _, _, stamp := s.Map(0)
	for name, content := range map[string]string{"empty": "", "short": "TATAMI", "other": string(make([]byte, block)), "b.1.tmp": "x"} {
		check(t, os.WriteFile(filepath.Join(dir, name), []byte(content), 0o600))
	}
	check(t, shared.Retire(dir))
	if _, _, n, _ := s.Map(0); n > 0 || s.Valid(stamp) || s.Moved() {
		t.Errorf("%d bytes of a retired file", n)
	}
	left, err := os.ReadDir(dir)
	check(t, err)
	if len(left) > 0 {
		t.Errorf("left: %v", left)
	}
	check(t, shared.Retire(dir))
	if err := shared.Retire(filepath.Join(dir, "none")); err == nil {
		t.Error("no error for what is no directory")
	}
	check(t, os.Symlink("/etc/passwd", filepath.Join(dir, "link")))
	if err := shared.Retire(dir); !errors.Is(err, unix.ELOOP) {
		t.Errorf("symlink: %v", err)
	}
}

// Readers may be of another version than the store that opens next: what they read is
// ended, too, whatever else their files have.
func TestRetireOtherVersion(t *testing.T) {
	dir := t.TempDir()
	b := stateBytes(t, 0)
	binary.NativeEndian.PutUint64(b[8:], 9)
	binary.NativeEndian.PutUint64(b[8*3:], 5)
	for name, n := range map[string]int{"whole": len(b), "other body": 8*8 + 3} {
		name = filepath.Join(dir, name)
		check(t, os.WriteFile(name, b[:n], 0o600))
		f, err := os.Open(name)
		check(t, err)
		defer f.Close()
		check(t, shared.Retire(dir))
		head := make([]byte, 32)
		_, err = f.ReadAt(head, 0)
		check(t, err)
		if state, epoch := binary.NativeEndian.Uint64(head[16:]), binary.NativeEndian.Uint64(head[24:]); state != 3 || epoch != 6 {
			t.Errorf("%s: state %d, epoch %d", name, state, epoch)
		}
		if _, err := os.Stat(name); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s stays: %v", name, err)
		}
	}
}

// A full disk is an error, not a signal, and leaves nothing.
func TestCreateFull(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: mounts a filesystem")
	}
	dir := t.TempDir()
	check(t, unix.Mount("tmpfs", dir, "tmpfs", 0, "size=64k"))
	defer func() { check(t, unix.Unmount(dir, 0)) }()
	many := make([]shared.Extent, 10_000)
	for i := range many {
		many[i] = shared.Extent{Off: int64(i) * 10, End: int64(i)*10 + 5}
	}
	if _, err := shared.Create(dir, "x", 100_000, many); !errdefs.IsResourceExhausted(err) {
		t.Errorf("create: %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) > 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

// stateBytes is a state file with the chunks that are set.
func stateBytes(t testing.TB, set ...int) []byte {
	st := create(t)
	for _, i := range set {
		st.Set(i)
	}
	f, err := st.Open()
	check(t, err)
	defer f.Close()
	b := make([]byte, block)
	n, _ := f.Read(b) // all of it: it is small
	return b[:n]
}

// openBytes opens a state file of these bytes, which stays open in state.
func openBytes(t testing.TB, b []byte, data *os.File, off int64) (s *shared.Segment, state *os.File, err error) {
	t.Helper()
	state = memoryFile(t)
	_, err = state.Write(b)
	check(t, err)
	f, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", state.Fd()))
	check(t, err)
	s, err = shared.Open(f, data, off)
	return s, state, err
}

func TestOpenRefuses(t *testing.T) {
	word := func(i int, v uint64) func([]byte) []byte {
		return func(b []byte) []byte { binary.NativeEndian.PutUint64(b[8*i:], v); return b }
	}
	for name, c := range map[string]struct {
		harm func([]byte) []byte
		data int64 // bytes of the data file that are missing
		off  int64
	}{
		"empty":              {func(b []byte) []byte { return nil }, 0, 0},
		"header only":        {func(b []byte) []byte { return b[:64] }, 0, 0},
		"short":              {func(b []byte) []byte { return b[:len(b)-8] }, 0, 0},
		"half a word short":  {func(b []byte) []byte { return b[:len(b)-4] }, 0, 0},
		"long":               {func(b []byte) []byte { return append(b, make([]byte, 8)...) }, 0, 0},
		"magic":              {word(0, 5), 0, 0},
		"version":            {word(1, 2), 0, 0},
		"count":              {word(4, 5), 0, 0},
		"count overflows":    {word(4, 1<<63+4), 0, 0},
		"size":               {word(5, 1<<63), 0, 0},
		"segment too small":  {word(5, 8*block), 0, 0},
		"chunks overlap":     {word(8+1, block-1), 0, 0},
		"chunk is negative":  {word(8+2, 1<<63), 0, 0},
		"chunk without end":  {word(8+4, 0), 0, 0},
		"chunk behind end":   {word(8+4+3, uint64(size)+1), 0, 0},
		"data too short":     {func(b []byte) []byte { return b }, 1, 0},
		"offset too high":    {func(b []byte) []byte { return b }, 0, 1},
		"offset negative":    {func(b []byte) []byte { return b }, 0, -1},
		"offset of overflow": {func(b []byte) []byte { return b }, 0, 1<<63 - 1},
	} {
		t.Run(name, func(t *testing.T) {
			_, state, err := openBytes(t, c.harm(stateBytes(t)), dataFile(t, size-c.data), c.off)
			check(t, state.Close())
			if !errdefs.IsDataLoss(err) {
				t.Errorf("%v", err)
			}
		})
	}
	a, b, err := os.Pipe()
	check(t, err)
	defer b.Close()
	if _, err := shared.Open(a, dataFile(t, size), 0); !errdefs.IsDataLoss(err) {
		t.Errorf("a pipe as state: %v", err)
	}
}

// Whatever the state file says, and is made to say later, is an error or places
// within the segment.
func FuzzOpen(f *testing.F) {
	good := stateBytes(f, 0, 2)
	f.Add(good, good)
	f.Add(good, stateBytes(f))
	f.Add(good, bytes.Repeat([]byte{0xff}, len(good)))
	f.Add(good, make([]byte, len(good)))
	f.Add(good[:100], good)
	const off = 3 * block
	f.Fuzz(func(t *testing.T, first, later []byte) {
		if len(first) > 1<<20 {
			return
		}
		s, state, err := openBytes(t, first, dataFile(t, off+size), off)
		defer state.Close()
		if err != nil {
			return
		}
		defer s.Close()
		if s.Size() > size {
			t.Fatalf("a segment of %d bytes in a file of %d", s.Size(), size)
		}
		inBounds(t, s, off)
		_, err = state.WriteAt(later[:min(len(later), len(first))], 0)
		check(t, err)
		inBounds(t, s, off)
	})
}

func inBounds(t *testing.T, s *shared.Segment, base int64) {
	t.Helper()
	for off := int64(-1); off < size+2; off += 777 {
		f, at, n, stamp := s.Map(off)
		if n < 0 || n > 0 && (f == nil || at != base+off || off < 0 || off+n > s.Size()) {
			t.Fatalf("at %d: %d bytes at %d", off, n, at)
		}
		s.Valid(stamp)
	}
	s.Moved()
}
