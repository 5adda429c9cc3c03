package convert_test

import (
	"bytes"
	"fmt"
	"io"
	"sync"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"

	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tools/convert"
)

// benchLayer is much like a distribution's: many small files of text and some
// large ones, half of them text. About 100 MB.
var benchLayer = sync.OnceValue(func() []byte {
	t := torture.NewTar()
	all := text(5, 4<<20)
	for i := range 6000 {
		n := 200 + i*i%13_000
		t.File(fmt.Sprintf("usr/share/%d/%d", i/100, i), string(all[i*97%(1<<20):][:n]))
	}
	for i := range 4 {
		t.File(fmt.Sprintf("usr/lib/text-%d", i), string(text(uint64(i), 10<<20)))
		t.Random(fmt.Sprintf("usr/lib/noise-%d", i), 3<<20)
	}
	return t.Bytes()
})

// BenchmarkLayer compares with stargz-snapshotter's builder on the same tar at
// the same level. "ratio" is the size of the blob by that of the tar.
func BenchmarkLayer(b *testing.B) {
	theirs := func(opts ...estargz.Option) func([]byte, io.Writer) error {
		return func(plain []byte, w io.Writer) error {
			blob, err := estargz.Build(io.NewSectionReader(bytes.NewReader(plain), 0, int64(len(plain))), opts...)
			if err != nil {
				return err
			}
			defer blob.Close()
			_, err = io.Copy(w, blob)
			return err
		}
	}
	ours := func(opts convert.Options) func([]byte, io.Writer) error {
		return func(plain []byte, w io.Writer) error {
			_, err := convert.Layer(b.Context(), bytes.NewReader(plain), w, opts)
			return err
		}
	}
	compression := func() estargz.Option {
		return estargz.WithCompression(struct {
			*zstdchunked.Compressor
			*zstdchunked.Decompressor
		}{&zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault}, &zstdchunked.Decompressor{}})
	}
	for _, c := range []struct {
		name string
		f    func([]byte, io.Writer) error
	}{
		{"estargz-9/theirs", theirs()},
		{"estargz-9/ours", ours(convert.Options{Format: convert.EStargz, Level: 9})},
		{"estargz-6/theirs", theirs(estargz.WithCompressionLevel(6))},
		{"estargz-6/ours", ours(convert.Options{Format: convert.EStargz, Level: 6})},
		{"estargz-9-packed/theirs", theirs(estargz.WithMinChunkSize(64 << 10))},
		{"estargz-9-packed/ours", ours(convert.Options{Format: convert.EStargz, Level: 9, Pack: 512 << 10})},
		{"zstd-3/theirs", theirs(compression())},
		{"zstd-3/ours", ours(convert.Options{Format: convert.ZstdStargz})},
		{"zstdchunked-3/ours", ours(convert.Options{Format: convert.ZstdChunked})},
	} {
		b.Run(c.name, func(b *testing.B) {
			plain := benchLayer()
			b.SetBytes(int64(len(plain)))
			b.ReportAllocs()
			var n int64
			for b.Loop() {
				n = 0
				if err := c.f(plain, counting{&n}); err != nil {
					b.Fatal(err)
				}
			}
			b.ReportMetric(float64(n)/float64(len(plain)), "ratio")
		})
	}
}

// counting counts what is written.
type counting struct{ n *int64 }

func (c counting) Write(p []byte) (int, error) {
	*c.n += int64(len(p))
	return len(p), nil
}
