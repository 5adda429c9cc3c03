package unpack

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tests/treecmp"
)

// FuzzLayer unpacks anything beside a directory that must stay as it is.
func FuzzLayer(f *testing.F) {
	if os.Getuid() != 0 {
		f.Skip("needs root: makes devices and trusted attributes")
	}
	for _, entries := range [][]registrytest.Entry{
		{tarDir("d/", 0o755), tarFile("d/f", 0o644, "x"), tarHard("h", "d/f"), tarSym("l", "../outside"), tarFile("l/evil", 0o644, "x")},
		{tarFile("d/.wh.x", 0, ""), tarFile("d/.wh..wh..opq", 0, ""), tarSym("a", "/b"), tarSym("b", "a"), tarFile("a/x", 0o644, "")},
		{entry(tar.Header{Name: "p", Typeflag: tar.TypeFifo}), entry(tar.Header{Name: "c", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3})},
	} {
		f.Add(registrytest.Must(registrytest.Tar(entries...)))
	}
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		outside, layer := filepath.Join(dir, "outside"), filepath.Join(dir, "0")
		for _, d := range []string{outside, layer} {
			if err := os.Mkdir(d, 0o755); err != nil {
				t.Fatal(err)
			}
		}
		before, err := treecmp.Snapshot(dir, "0")
		if err != nil {
			t.Fatal(err)
		}
		left, err := unpackLayer(t.Context(), layer, bytes.NewReader(data), ocispec.Descriptor{Digest: digest.FromBytes(data), Size: int64(len(data))}, "")
		if err == nil {
			_ = left.settle(dir, 0) // an error is a good answer
		}
		after, err := treecmp.Snapshot(dir, "0")
		if err != nil {
			t.Fatal(err)
		}
		if d := treecmp.Diff(before, after, treecmp.Mtime); len(d) > 0 {
			t.Fatalf("changed outside: %q", d)
		}
	})
}
