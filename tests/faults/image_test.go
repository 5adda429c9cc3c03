package faults

import (
	"bytes"
	"compress/gzip"
	"context"
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os/exec"
	"strings"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// What an image has: files of noise, far more than a guest fetches to mount it.
const (
	files    = 5
	fileSize = 700_000
	readers  = 3 // programs that read at a time
)

var seeds atomic.Uint64

// image is one of one eStargz layer, unlike all others: nobody has any of it.
type image struct {
	layer registrytest.Layer
	sums  []string // of the files, as sha256sum has them
}

func newImage() image {
	var i image
	var entries []registrytest.Entry
	for n := range files {
		data := make([]byte, fileSize)
		_, _ = rand.NewChaCha8([32]byte{byte(seeds.Add(1)), byte(seeds.Load() >> 8)}).Read(data) // has no error
		entries = append(entries, registrytest.File(name(n), 0o644, string(data)))
		i.sums = append(i.sums, fmt.Sprintf("%x  %s", sha256.Sum256(data), name(n)))
	}
	i.layer = registrytest.Must(registrytest.EStargz(registrytest.Must(registrytest.Tar(entries...)), estargz.WithCompressionLevel(gzip.NoCompression)))
	return i
}

func name(n int) string { return fmt.Sprintf("f%02d", n) }

// push adds a new image to a registry.
func push(reg *registrytest.Server, repo string) image {
	i := newImage()
	reg.PushImage(repo, "v1", registrytest.Image{Layers: []registrytest.Layer{i.layer}})
	return i
}

// read has programs read files [from, to) of the image, several at a time.
func (i image) read(t *testing.T, root string, from, to int) error {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	errs := make([]error, readers)
	var wg sync.WaitGroup
	for r := range readers {
		wg.Go(func() {
			for n := from + r; n < to; n += readers {
				if err := i.sum(ctx, root, n); err != nil {
					errs[r] = err
					return
				}
			}
		})
	}
	wg.Wait()
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	return nil
}

func (i image) sum(ctx context.Context, root string, n int) error {
	cmd := exec.CommandContext(ctx, "sha256sum", name(n))
	cmd.Dir = root
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		return fmt.Errorf("%s: %w: %s", name(n), err, errs.String())
	}
	if got := strings.TrimSpace(string(out)); got != i.sums[n] {
		return fmt.Errorf("read %s, want %s", got, i.sums[n])
	}
	return nil
}
