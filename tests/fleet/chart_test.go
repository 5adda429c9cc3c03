package fleet

import (
	"bytes"
	"encoding/xml"
	"errors"
	"flag"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"testing"
)

var update = flag.Bool("update", false, "draw the charts in plots anew")

// The charts that README shows are those of the model as it is.
func TestPlots(t *testing.T) {
	for name, c := range map[string]Chart{"published.svg": Published(), "times.svg": Times(), "bytes.svg": Bytes()} {
		var b bytes.Buffer
		if err := c.WriteSVG(&b); err != nil {
			t.Fatal(err)
		}
		wellFormed(t, name, b.Bytes())
		file := filepath.Join("plots", name)
		if *update {
			if err := os.WriteFile(file, b.Bytes(), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		// Other processors may round differently: they fuse multiplication and addition.
		if runtime.GOARCH == "amd64" && !bytes.Equal(b.Bytes(), want) {
			t.Errorf("%s is not what the model gives: go test ./tests/fleet -update", file)
		}
	}
}

func wellFormed(t *testing.T, name string, svg []byte) {
	t.Helper()
	for d := xml.NewDecoder(bytes.NewReader(svg)); ; {
		if _, err := d.Token(); errors.Is(err, io.EOF) {
			return
		} else if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
}
