package layer_test

import (
	"archive/tar"
	"bytes"
	"crypto/sha256"
	"fmt"
	"io"
	"math/rand/v2"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
)

// checkTable holds that the chunks are the segment without stretches of zeros,
// and that they end where they should.
func checkTable(t *testing.T, l *index.Layer, seg []byte) {
	t.Helper()
	if l.Table.Size != int64(len(seg)) {
		t.Fatalf("table says %d bytes, segment has %d", l.Table.Size, len(seg))
	}
	begins := map[int64]int64{} // sizes of files by offset
	for _, e := range l.Entries {
		if e.Size > 0 {
			begins[e.Off] = e.Size
		}
	}
	end := int64(0)
	for _, c := range l.Table.Chunks {
		if bytes.Count(seg[end:c.Off], []byte{0}) != int(c.Off-end) {
			t.Fatalf("data before the chunk at %d is in none", c.Off)
		}
		if c.Len > index.UnitSize || c.Sum != sha256.Sum256(seg[c.Off:c.End()]) {
			t.Fatalf("chunk %+v", c)
		}
		checkCut(t, c, begins, l.Table.Size)
		end = c.End()
	}
	if bytes.Count(seg[end:], []byte{0}) != len(seg)-int(end) {
		t.Fatalf("data behind the last chunk at %d", end)
	}
}

// checkCut holds that a chunk has bytes of one large file only, from whole
// units of it, or of small ones.
func checkCut(t *testing.T, c index.Chunk, begins map[int64]int64, segment int64) {
	t.Helper()
	for off, size := range begins {
		end := off + index.RoundUp(size)
		if end <= c.Off || off >= c.End() {
			continue
		}
		if size >= index.UnitSize && ((c.Off-off)%index.UnitSize != 0 || c.Off < off || c.End() != min(end, c.Off+index.UnitSize)) {
			t.Fatalf("chunk %d+%d of a file of %d bytes at %d", c.Off, c.Len, size, off)
		}
		if size < index.UnitSize && (off < c.Off || end > c.End()) {
			t.Fatalf("chunk %d+%d cuts a file of %d bytes at %d", c.Off, c.Len, size, off)
		}
	}
	next, ok := begins[c.End()]
	if ok && c.Len < 16<<10 && begins[c.Off] < index.UnitSize && c.Len+index.RoundUp(next) <= index.UnitSize {
		if _, first := begins[c.Off]; first {
			t.Fatalf("chunk %d+%d ends too early", c.Off, c.Len)
		}
	}
}

// version writes files of a software package as a tar: sizes as they are found,
// most of them small. edit may change or add files.
func version(n int, edit func(i int, name string, content []byte) []byte) []byte {
	rnd := rand.New(rand.NewPCG(7, 7))
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	write := func(name string, content []byte) {
		must(w.WriteHeader(&tar.Header{Name: name, Size: int64(len(content)), Mode: 0o644}))
		_, err := w.Write(content)
		must(err)
	}
	for i := range n {
		size := 100 << rnd.IntN(8) // up to some 25 kB
		switch {
		case i == n/2:
			size = 4 << 20
		case i%50 == 0:
			size = 70_000 + rnd.IntN(400_000)
		}
		content := make([]byte, size+rnd.IntN(size))
		for k := range content {
			content[k] = byte(rnd.Uint32())
		}
		name := fmt.Sprintf("usr/lib/python3/site-packages/module%d.py", i)
		if more := edit(i, name, content); more != nil {
			write(fmt.Sprintf("usr/lib/new%d", i), more)
		}
		write(name, content)
	}
	must(w.Close())
	return b.Bytes()
}

// TestVersionsShareChunks holds that two versions of a layer have most chunks
// in common: one has a small file more near its front, and in the middle a
// large one has other bytes.
func TestVersionsShareChunks(t *testing.T) {
	const files = 2000
	one := version(files, func(int, string, []byte) []byte { return nil })
	two := version(files, func(i int, _ string, content []byte) []byte {
		switch i {
		case 20:
			return []byte("a new small file")
		case files / 2:
			copy(content[1<<20:], "other bytes")
		}
		return nil
	})
	known := map[index.Sum]bool{}
	a, b := buildTable(t, one), buildTable(t, two)
	for _, c := range a.Chunks {
		known[c.Sum] = true
	}
	var shared, all int64
	for _, c := range b.Chunks {
		if all += c.Len; known[c.Sum] {
			shared += c.Len
		}
	}
	t.Logf("%d of %d bytes are shared, in chunks of %d bytes on average", shared, all, all/int64(len(b.Chunks)))
	if shared*100 < all*90 {
		t.Errorf("%d of %d bytes are shared, want 90 %%", shared, all)
	}
}

func buildTable(t *testing.T, blob []byte) *index.Table {
	t.Helper()
	l, err := layer.Build(t.Context(), bytes.NewReader(blob), describe(blob), io.Discard, layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return &l.Table
}

// TestLargeFilesMakeTheSameChunks holds that what a large file is cut into does
// not depend on what is before it.
func TestLargeFilesMakeTheSameChunks(t *testing.T) {
	large := content(300_000)
	var first []index.Chunk
	for _, before := range []int{0, 1, 5000, 66_000, 200_000} {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, f := range []struct {
			name string
			data []byte
		}{{"a", content(before)}, {"large", large}, {"z", []byte("a small file behind it")}} {
			must(w.WriteHeader(&tar.Header{Name: f.name, Size: int64(len(f.data))}))
			_, err := w.Write(f.data)
			must(err)
		}
		must(w.Close())
		chunks := buildTable(t, b.Bytes()).Chunks
		if before == 0 {
			first = chunks
		}
		chunks = chunks[len(chunks)-len(first):]
		for i, c := range chunks {
			if c.Sum != first[i].Sum || c.Len != first[i].Len {
				t.Errorf("behind %d bytes chunk %d is %+v, not %+v", before, i, c, first[i])
			}
		}
	}
}
