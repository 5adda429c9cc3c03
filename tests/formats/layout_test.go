package formats

import (
	"compress/gzip"
	"io"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/ocilayout"
)

// writeLayout makes a layout of an image with gzip layers, the lowest first.
func writeLayout(t *testing.T, tars [][]byte) string {
	t.Helper()
	dir, err := ocilayout.Create(filepath.Join(t.TempDir(), "gzip"))
	if err != nil {
		t.Fatal(err)
	}
	img := ocilayout.Image{Config: ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		RootFS:   ocispec.RootFS{Type: "layers"},
	}}
	for _, tar := range tars {
		desc, err := dir.PutFrom(ocispec.MediaTypeImageLayerGzip, func(w io.Writer) error { return compress(w, tar) })
		if err != nil {
			t.Fatal(err)
		}
		img.Manifest.Layers = append(img.Manifest.Layers, desc)
		img.Config.RootFS.DiffIDs = append(img.Config.RootFS.DiffIDs, digest.FromBytes(tar))
	}
	if err := dir.Finish(img); err != nil {
		t.Fatal(err)
	}
	return string(dir)
}

func compress(w io.Writer, b []byte) error {
	zw := gzip.NewWriter(w)
	if _, err := zw.Write(b); err != nil {
		return err
	}
	return zw.Close()
}
