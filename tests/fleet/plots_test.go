package fleet

import (
	"bytes"
	"flag"
	"os"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/tatami-containers/tatami/tests/chart"
)

var update = flag.Bool("update", false, "draw the charts in plots anew")

// The charts that README shows are those of the model as it is.
func TestPlots(t *testing.T) {
	for name, c := range map[string]chart.Chart{"published.svg": Published(), "times.svg": Times(), "bytes.svg": Bytes()} {
		var b bytes.Buffer
		if err := c.WriteSVG(&b); err != nil {
			t.Fatal(err)
		}
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
