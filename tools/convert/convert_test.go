package convert_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"sync"
	"testing"
	"unicode/utf8"

	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tools/convert"
)

var formats = map[string]convert.Format{
	"estargz": convert.EStargz, "zstdchunked": convert.ZstdChunked, "zstdstargz": convert.ZstdStargz,
}

// result is a converted layer.
type result struct {
	*convert.Result
	blob []byte
}

func layer(tb testing.TB, plain []byte, opts convert.Options) result {
	tb.Helper()
	var b bytes.Buffer
	r, err := convert.Layer(tb.Context(), bytes.NewReader(plain), &b, opts)
	if err != nil {
		tb.Fatal(err)
	}
	return result{r, b.Bytes()}
}

// text is n bytes that compress somewhat.
func text(seed uint64, n int) []byte {
	rnd := rand.New(rand.NewPCG(seed, 1))
	b := make([]byte, 0, n+64)
	for len(b) < n {
		b = fmt.Appendf(b, "%d %x the same words\n", len(b), rnd.Uint32N(1<<20))
	}
	return b[:n]
}

// base is the first of the torture layers without what JSON cannot hold, and
// files of several chunks, of zeros, and around them.
var base = sync.OnceValue(func() []byte {
	t := torture.NewTar()
	t.Dir("big/")
	t.File("big/text", string(text(1, 3_000_000)))
	t.Random("big/noise", 2_500_000)
	holes := make([]byte, 3_000_000)
	copy(holes[100_000:], text(2, 50_000))
	copy(holes[1_500_001:], text(3, 400_000))
	t.File("big/holes", string(holes))
	t.File("big/zeros", string(make([]byte, 2_200_000)))
	t.File("big/few-zeros", string(make([]byte, 70_000)))
	t.Link("big/link", "big/text")
	tail := t.Bytes()
	return concat(readable(torture.Layers()[0]), tail)
})

// concat is one tar of two.
func concat(a, b []byte) []byte {
	return append(bytes.TrimRight(a, "\x00"), append(make([]byte, -len(bytes.TrimRight(a, "\x00"))&511), b...)...)
}

// readable drops entries whose names are not UTF-8.
func readable(plain []byte) []byte {
	return without(plain, func(h *tar.Header) bool {
		return !utf8.ValidString(h.Name) || !utf8.ValidString(h.Linkname)
	})
}

// without drops entries.
func without(plain []byte, which func(h *tar.Header) bool) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	walk(plain, func(h *tar.Header, data []byte) {
		if which(h) {
			return
		}
		must(w.WriteHeader(h))
		_, err := w.Write(data)
		must(err)
	})
	must(w.Close())
	return b.Bytes()
}

func must(err error) {
	if err != nil {
		panic(err)
	}
}

// walk reads a tar.
func walk(plain []byte, f func(h *tar.Header, data []byte)) {
	r := tar.NewReader(bytes.NewReader(plain))
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return
		}
		must(err)
		var data bytes.Buffer
		_, err = data.ReadFrom(r)
		must(err)
		f(h, data.Bytes())
	}
}

// TestWorkers holds that the blob does not depend on how many goroutines make it.
func TestWorkers(t *testing.T) {
	for name, f := range formats {
		for _, opts := range []convert.Options{{Level: 1}, {ChunkSize: 200_000, Pack: 100_000}} {
			if opts.Format = f; f == convert.ZstdChunked {
				opts.Pack = 0
			}
			t.Run(fmt.Sprint(name, opts.ChunkSize), func(t *testing.T) {
				opts.Workers = 1
				one := layer(t, base(), opts)
				for _, opts.Workers = range []int{2, 7} {
					if many := layer(t, base(), opts); !bytes.Equal(one.blob, many.blob) || fmt.Sprint(one.Result) != fmt.Sprint(many.Result) {
						t.Errorf("%d workers make another blob", opts.Workers)
					}
				}
			})
		}
	}
}
