package layertest

import (
	"archive/tar"
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"path"
	"strings"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Opener is what reads a layer's segment: layer.Reader.
type Opener func(off, n int64) (io.ReadCloser, error)

// Segment reads the whole segment, fails the test unless every chunk of it has
// its digest, and reads some ranges again, which must be the same.
func Segment(t *testing.T, l *index.Layer, open Opener) []byte {
	t.Helper()
	if err := l.Validate(); err != nil {
		t.Fatal(err)
	}
	seg := read(t, open, 0, l.Table.Size)
	for i, c := range l.Table.Chunks {
		if l.Table.Algorithm.Sum(seg[c.Off:c.End()]) != c.Sum {
			t.Fatalf("chunk %d at %d, %d bytes, does not have its digest", i, c.Off, c.Len)
		}
		if i%7 == 0 && !bytes.Equal(read(t, open, c.Off, c.Len), seg[c.Off:c.End()]) {
			t.Fatalf("chunk %d alone is not the same", i)
		}
	}
	rnd := rand.New(rand.NewPCG(7, 8))
	for i := range 60 {
		n := min(rnd.Int64N(100<<(i%12)), l.Table.Size)
		off := rnd.Int64N(l.Table.Size - n + 1)
		if !bytes.Equal(read(t, open, off, n), seg[off:off+n]) {
			t.Fatalf("range %d+%d is not the same", off, n)
		}
	}
	return seg
}

func read(t *testing.T, open Opener, off, n int64) []byte {
	t.Helper()
	r, err := open(off, n)
	if err != nil {
		t.Fatal(err)
	}
	p, err := io.ReadAll(r)
	if err != nil || int64(len(p)) != n {
		t.Fatalf("range %d+%d: %d bytes, %v", off, n, len(p), err)
	}
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	return p
}

// SameContent fails the test unless every file of the layer has the bytes that
// the last file of its name has in the uncompressed tar.
func SameContent(t *testing.T, l *index.Layer, segment, plain []byte) {
	t.Helper()
	files, latest := map[string][]byte{}, map[string]index.Entry{}
	for r := tar.NewReader(bytes.NewReader(plain)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		name := text(strings.TrimPrefix(path.Clean("/"+h.Name), "/"))
		if files[name], err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
	}
	for _, e := range l.Entries {
		latest[e.Path] = e
	}
	for _, e := range latest {
		if e.Kind == index.File && !bytes.Equal(segment[e.Off:e.Off+e.Size], files[e.Path]) {
			t.Fatalf("%q has other content", e.Path)
		}
	}
}
