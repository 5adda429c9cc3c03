package store

import (
	"bytes"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// A segment can move house under its readers.
func TestReadWhileMoving(t *testing.T) {
	plain := bytes.Repeat([]byte("where is it "), index.UnitSize)[:4*index.UnitSize]
	table := &index.Table{Size: int64(len(plain))}
	for off := int64(0); off < table.Size; off += index.UnitSize {
		table.Chunks = append(table.Chunks, index.Chunk{Off: off, Len: index.UnitSize})
	}
	name := filepath.Join(t.TempDir(), "data")
	if err := os.WriteFile(name, plain, 0o600); err != nil {
		t.Fatal(err)
	}
	g := newSegment(&Store{mem: newMemory(0, nil)}, "id", table)
	move := func() {
		f, err := os.Open(name)
		if err != nil {
			t.Error(err)
			return
		}
		g.moveTo(&home{file: f}, nil, true)
	}
	move()
	var moved atomic.Bool
	var wg sync.WaitGroup
	wg.Go(func() {
		for range 10_000 {
			move()
		}
		moved.Store(true)
	})
	for range 4 {
		wg.Go(func() {
			p := make([]byte, 4096)
			for k := int64(0); !moved.Load(); k++ {
				off := k % 60 * 4096
				if !g.present(off, off+4096) {
					t.Error("not present")
				}
				if err := g.pread(p, off); err != nil || !bytes.Equal(p, plain[off:off+4096]) {
					t.Errorf("read at %d: %v", off, err)
					return
				}
			}
		})
	}
	wg.Wait()
	g.dirty.Store(false) // nothing of this is to be flushed
	g.close()
}
