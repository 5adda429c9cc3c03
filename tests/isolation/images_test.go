package isolation

import (
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// chunkSize of layers that are read lazily, in bytes.
const chunkSize = 64 << 10

// layerSize is the most that a layer has, in bytes: images of containers have several.
const layerSize = 64 << 20

// content is what files are made of.
type content struct {
	dir   string
	files int
	size  int // of a file, in bytes
	// packs says that three quarters of the bytes can be compressed away.
	packs bool
}

// names of the files, in the order in which the layers have them.
func (c content) names() (all []string) {
	for i := range c.files {
		all = append(all, fmt.Sprintf("%s/%04d", c.dir, i))
	}
	return all
}

func (c content) total() int64 { return int64(c.files) * int64(c.size) }

// layers makes eStargz layers of the files. The same seed gives the same bytes, and
// different ones share no chunk.
func (c content) layers(tb testing.TB, seed string, pack func([]byte) (registrytest.Layer, error)) (all []registrytest.Layer) {
	tb.Helper()
	var key [32]byte
	copy(key[:], seed)
	src := rand.NewChaCha8(key)
	entries, bytes := []registrytest.Entry{registrytest.Dir(c.dir, 0o755)}, 0
	flush := func() {
		tar, err := registrytest.Tar(entries...)
		check(tb, err)
		l, err := pack(tar)
		check(tb, err)
		all, entries, bytes = append(all, l), []registrytest.Entry{registrytest.Dir(c.dir, 0o755)}, 0
	}
	for _, name := range c.names() {
		if bytes > 0 && bytes+c.size > layerSize {
			flush()
		}
		b := make([]byte, c.size)
		c.fill(src, b)
		entries = append(entries, registrytest.Entry{Header: registrytest.File(name, 0o644, "").Header, Body: b})
		bytes += c.size
	}
	flush()
	return all
}

func (c content) fill(src *rand.ChaCha8, b []byte) {
	if !c.packs {
		_, _ = src.Read(b) // never fails
		return
	}
	for ; len(b) > 0; b = b[min(len(b), 4096):] {
		_, _ = src.Read(b[:min(len(b), 1024)])
	}
}

// lazy packs a layer that is read lazily.
func lazy(tar []byte) (registrytest.Layer, error) {
	return registrytest.EStargz(tar, estargz.WithChunkSize(chunkSize), estargz.WithCompressionLevel(1), estargz.WithParallelism(2))
}

// plain packs a layer that the node has to inflate and index before it is read.
func plain(tar []byte) (registrytest.Layer, error) { return registrytest.GzipLevel(tar, 6) }
