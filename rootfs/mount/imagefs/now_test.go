package imagefs

import (
	"bytes"
	"context"
	"io"
	"sync/atomic"
	"syscall"
	"testing"
)

// readyFile has the bytes of even blocks at hand.
type readyFile struct {
	funcFile
	now atomic.Int64
}

func (f *readyFile) ReadNow(p []byte, off int64) bool {
	if off>>12&1 == 1 {
		return false
	}
	f.now.Add(1)
	_, _ = fill(p, off) // never fails
	return true
}

// Small reads of what is at hand are answered on the spot, all others as ever; these
// keep nobody waiting.
func TestReadsNow(t *testing.T) {
	s, k, _ := serve(t, Config{})
	const size = 1<<20 + 100
	hold := make(chan struct{})
	var later atomic.Int64
	file := &readyFile{funcFile: funcFile{size, func(_ context.Context, p []byte, off int64) (int, error) {
		later.Add(1)
		if off == 4096 {
			<-hold
		}
		n, _ := fill(p, off)
		if off+int64(n) == size {
			return n, io.EOF
		}
		return n, nil
	}}}
	if err := s.Add(Node{ID: 5, Name: "five", File: file}); err != nil {
		t.Fatal(err)
	}
	k.requests <- read(10, 5, 4096, 4096)
	for i, tc := range []struct {
		name            string
		off, size, want uint64
		now             bool
	}{
		{"at hand", 0, 4096, 4096, true},
		{"not at hand", 3 * 4096, 4096, 4096, false},
		{"largest", 2 * 4096, maxNow, maxNow, true},
		{"too large", 2 * 4096, maxNow + 4096, maxNow + 4096, false},
		{"over the end", size - 100, 4096, 100, true},
		{"behind the end", 2 << 20, 4096, 0, false},
		{"far behind", 1 << 63, 4096, 0, false},
	} {
		before := file.now.Load()
		r := k.ask(t, read(uint64(20+i), 5, tc.off, tc.size))
		want := make([]byte, tc.want)
		_, _ = fill(want, int64(tc.off))
		if r.unique != uint64(20+i) || r.errno != 0 || !bytes.Equal(r.data, want) {
			t.Errorf("%s: answer to %d: %v, %d bytes", tc.name, r.unique, r.errno, len(r.data))
		}
		if now := file.now.Load() > before; now != tc.now {
			t.Errorf("%s: on the spot: %v", tc.name, now)
		}
	}
	if st := s.Stats(); st.Reads != 5 || st.ReadBytes != 4096+4096+maxNow+maxNow+4096+100 {
		t.Errorf("counted %+v", st)
	}
	close(hold)
	if r := <-k.replies; r.unique != 10 || len(r.data) != 4096 {
		t.Errorf("the read that waited: %d, %d bytes", r.unique, len(r.data))
	}
	s.Abort(5)
	if r := k.ask(t, read(30, 5, 0, 4096)); r.errno != syscall.EIO {
		t.Errorf("a read after Abort: %v", r.errno)
	}
	s.Remove(5)
	if r := k.ask(t, read(31, 5, 0, 4096)); r.errno != syscall.ESTALE {
		t.Errorf("a read after Remove: %v", r.errno)
	}
}
