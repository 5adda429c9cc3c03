package convert_test

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"runtime"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tools/convert"
)

// odd is a tar of one entry behind another.
func odd(h *tar.Header) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	must(w.WriteHeader(&tar.Header{Name: "good", Mode: 0o644}))
	must(w.WriteHeader(h))
	_, err := w.Write(make([]byte, h.Size))
	must(err)
	must(w.Close())
	return b.Bytes()
}

// gnuSparse is a tar of one sparse file of the old GNU format.
func gnuSparse() []byte {
	b := odd(&tar.Header{Name: "holes", Mode: 0o644, Format: tar.FormatGNU})
	h := b[512:1024]
	h[156] = 'S'
	copy(h[483:], "00000010000\x00") // size; no fragments
	copy(h[148:], "        ")
	sum := 0
	for _, c := range h {
		sum += int(c)
	}
	copy(h[148:], []byte{byte('0' + sum>>15&7), byte('0' + sum>>12&7), byte('0' + sum>>9&7), byte('0' + sum>>6&7), byte('0' + sum>>3&7), byte('0' + sum&7), 0, ' '})
	return b
}

func TestErrors(t *testing.T) {
	good := base()
	cases := []struct {
		name string
		tar  []byte
		says []string
	}{
		{"leaves the layer", odd(&tar.Header{Name: "a/../../b"}), []string{"a/../../b", "out of the layer"}},
		{"link out", odd(&tar.Header{Name: "l", Typeflag: tar.TypeLink, Linkname: "../x"}), []string{`"l"`, "../x"}},
		{"no UTF-8", odd(&tar.Header{Name: "bad\xff"}), []string{`bad\xff`, "UTF-8"}},
		{"target not UTF-8", odd(&tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: "\xff"}), []string{`"l"`, "UTF-8"}},
		{"type", odd(&tar.Header{Name: "what", Typeflag: 'Z'}), []string{"what", "type"}},
		{"device", odd(&tar.Header{Name: "dev", Typeflag: tar.TypeChar, Devmajor: 1 << 20}), []string{"dev", "device number"}},
		{"owner", odd(&tar.Header{Name: "own", Uid: 1 << 33}), []string{"own", "owner"}},
		{"year", odd(&tar.Header{Name: "late", ModTime: time.Unix(1<<40, 0)}), []string{"late", "year"}},
		{"sparse", gnuSparse(), []string{"holes", "sparse"}},
		{"cut in data", good[:len(good)-500_000], []string{"big/", "EOF"}},
		{"cut in a header", odd(&tar.Header{Name: "x"})[:700], []string{"EOF"}},
		{"no tar", text(1, 5000), []string{"invalid tar header"}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			for name, f := range formats {
				for _, profile := range [][]string{nil, {"good"}} {
					_, err := convert.Layer(t.Context(), bytes.NewReader(c.tar), io.Discard, convert.Options{Format: f, Profile: profile, Level: 1})
					if !errdefs.IsInvalidArgument(err) {
						t.Fatalf("%s: error %v", name, err)
					}
					for _, s := range c.says {
						if !strings.Contains(err.Error(), s) && profile == nil {
							t.Errorf("%s: error %v does not say %q", name, err, s)
						}
					}
				}
			}
		})
	}
}

func TestOptions(t *testing.T) {
	for _, o := range []convert.Options{
		{}, {Format: 9}, {Format: convert.EStargz, Level: 10}, {Format: convert.ZstdChunked, Level: 20}, {Format: convert.EStargz, Level: -1},
		{Format: convert.EStargz, ChunkSize: 100}, {Format: convert.EStargz, ChunkSize: 1 << 30}, {Format: convert.EStargz, Pack: -1},
		{Format: convert.ZstdChunked, Pack: 1}, {Format: convert.EStargz, Pack: 1 << 40}, {Format: convert.EStargz, Workers: -1},
	} {
		if _, err := convert.Layer(t.Context(), bytes.NewReader(nil), io.Discard, o); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%+v: error %v", o, err)
		}
	}
}

// TestEnds holds that nothing goes on after an error of either side or of the
// context, wherever it comes.
func TestEnds(t *testing.T) {
	broken := errors.New("connection reset")
	before := runtime.NumGoroutine()
	for _, f := range formats {
		for _, at := range []int64{0, 700, 100_000, 5_000_000} {
			r := io.MultiReader(io.LimitReader(bytes.NewReader(base()), at), iotest.ErrReader(broken))
			opts := convert.Options{Format: f, Level: 1, ChunkSize: 100_000, Workers: 3}
			if _, err := convert.Layer(t.Context(), r, io.Discard, opts); !errors.Is(err, broken) {
				t.Errorf("reader fails at %d: %v", at, err)
			}
			if _, err := convert.Layer(t.Context(), bytes.NewReader(base()), &limited{n: at / 10, err: broken}, opts); !errors.Is(err, broken) {
				t.Errorf("writer fails at %d: %v", at/10, err)
			}
			ctx, cancel := context.WithCancel(t.Context())
			if _, err := convert.Layer(ctx, &cancelling{bytes.NewReader(base()), at, cancel}, io.Discard, opts); !errors.Is(err, context.Canceled) {
				t.Errorf("cancelled at %d: %v", at, err)
			}
		}
	}
	for range 100 {
		if runtime.NumGoroutine() <= before {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Errorf("%d goroutines, %d before", runtime.NumGoroutine(), before)
}

// limited takes n bytes.
type limited struct {
	n   int64
	err error
}

func (l *limited) Write(p []byte) (int, error) {
	if l.n -= int64(len(p)); l.n < 0 {
		return 0, l.err
	}
	return len(p), nil
}

// cancelling cancels a context when left bytes were read.
type cancelling struct {
	r      io.Reader
	left   int64
	cancel func()
}

func (c *cancelling) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	if c.left -= int64(n); c.left <= 0 {
		c.cancel()
	}
	return n, err
}

// FuzzLayer feeds tars that are none. What is accepted must unpack to
// what the result says.
func FuzzLayer(f *testing.F) {
	small := torture.NewTar()
	small.Dir("d")
	small.File("d/f", "content")
	small.Link("l", "d/f")
	f.Add(small.Bytes(), uint8(convert.ZstdChunked))
	f.Add(profiled(), uint8(convert.EStargz))
	f.Add(gnuSparse(), uint8(convert.ZstdStargz))
	f.Fuzz(func(t *testing.T, plain []byte, format uint8) {
		opts := convert.Options{Format: convert.Format(format%3 + 1), Level: 1, ChunkSize: 4096, Workers: 2, Profile: []string{"d/f"}}
		var b bytes.Buffer
		r, err := convert.Layer(t.Context(), bytes.NewReader(plain), &b, opts)
		if err != nil {
			return
		}
		if got := inflateAny(t, b.Bytes()); int64(len(got)) != r.PlainSize || r.DiffID != digest.FromBytes(got) {
			t.Errorf("%d plain bytes, said to be %d", len(got), r.PlainSize)
		}
	})
}

// inflateAny decompresses a blob with the libraries of others.
func inflateAny(t *testing.T, blob []byte) []byte {
	t.Helper()
	if !bytes.HasPrefix(blob, []byte{0x1f, 0x8b}) {
		return inflate(t, blob, -1)
	}
	z, err := gzip.NewReader(bytes.NewReader(blob))
	if err != nil {
		t.Fatal(err)
	}
	p, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return p
}
