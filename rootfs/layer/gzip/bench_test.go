package gzip

import (
	"bytes"
	stdgzip "compress/gzip"
	"io"
	"os"
	"testing"

	kgzip "github.com/klauspost/compress/gzip"
)

// corpus is machine code, data and strings as images have them: the test
// binary itself, up to 16 MiB of it.
func corpus(tb testing.TB) []byte {
	tb.Helper()
	name, err := os.Executable()
	if err != nil {
		tb.Fatal(err)
	}
	b, err := os.ReadFile(name)
	if err != nil {
		tb.Fatal(err)
	}
	return b[:min(len(b), 16<<20)]
}

func BenchmarkInflate(b *testing.B) {
	plain := corpus(b)
	gz := compress(b, plain, 6)
	readers := []struct {
		name string
		open func() (io.Reader, error)
	}{
		{"tatami", func() (io.Reader, error) { return new(Pool).NewReader(bytes.NewReader(gz)), nil }},
		{"standard", func() (io.Reader, error) { return stdgzip.NewReader(bytes.NewReader(gz)) }},
		{"klauspost", func() (io.Reader, error) { return kgzip.NewReader(bytes.NewReader(gz)) }},
	}
	for _, r := range readers {
		b.Run(r.name, func(b *testing.B) {
			b.SetBytes(int64(len(plain)))
			for b.Loop() {
				z, err := r.open()
				if err != nil {
					b.Fatal(err)
				}
				if n, err := io.Copy(io.Discard, z); err != nil || n != int64(len(plain)) {
					b.Fatalf("%d bytes, %v", n, err)
				}
			}
		})
	}
}

// BenchmarkRange is one read of 64 KiB from a random place, checkpoints 1 MiB
// apart.
func BenchmarkRange(b *testing.B) {
	plain := corpus(b)
	gz := compress(b, plain, 6)
	points := record(b, gz, 1<<20)
	var pool Pool
	buf := make([]byte, 64<<10)
	rnd := newRand()
	b.ReportAllocs()
	for b.Loop() {
		off := rnd.Int64N(int64(len(plain) - len(buf)))
		if err := readAt(&pool, gz, points, buf, off); err != nil {
			b.Fatal(err)
		}
	}
}
