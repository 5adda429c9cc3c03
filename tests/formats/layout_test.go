package formats

import (
	"compress/gzip"
	"io"
	"runtime"
	"testing"
)

// writeLayout makes a layout of an image with gzip layers, the lowest first.
func writeLayout(t *testing.T, tars [][]byte) string {
	t.Helper()
	dir := layoutDir(t)
	if err := dir.Finish(image(t, dir, tars, runtime.GOARCH)); err != nil {
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
