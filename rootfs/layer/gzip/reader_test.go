package gzip

import (
	"bytes"
	stdgzip "compress/gzip"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"runtime"
	"sort"
	"testing"
	"testing/iotest"

	kgzip "github.com/klauspost/compress/gzip"

	"github.com/tatami-containers/tatami/rootfs/index"
)

func newRand() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) }

func compress(tb testing.TB, plain []byte, level int) []byte {
	tb.Helper()
	var b bytes.Buffer
	w, err := stdgzip.NewWriterLevel(&b, level)
	if err != nil {
		tb.Fatal(err)
	}
	if _, err := w.Write(plain); err != nil {
		tb.Fatal(err)
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

// record streams gz once and returns its checkpoints.
func record(tb testing.TB, gz []byte, span int64) []index.Checkpoint {
	tb.Helper()
	r := new(Pool).NewReader(bytes.NewReader(gz))
	r.Record(span)
	if _, err := io.Copy(io.Discard, r); err != nil {
		tb.Fatal(err)
	}
	return r.Checkpoints()
}

// readAt fills p from plain offset off, and gives the decoder only the
// compressed bytes up to the checkpoint behind the range.
func readAt(pool *Pool, gz []byte, points []index.Checkpoint, p []byte, off int64) error {
	i := sort.Search(len(points), func(i int) bool { return points[i].Out > off }) - 1
	end := len(gz)
	for _, c := range points[i+1:] {
		if c.Out >= off+int64(len(p)) {
			end = int(c.Bit+7) / 8
			break
		}
	}
	r := pool.Resume(bytes.NewReader(gz[points[i].Bit/8:end]), points[i])
	if err := r.Discard(off - points[i].Out); err != nil {
		return err
	}
	if _, err := io.ReadFull(r, p); err != nil {
		return err
	}
	return r.Close()
}

// mixed is n bytes of text, repeats at many distances, noise and zeros.
func mixed(n int) []byte {
	rnd := newRand()
	var b []byte
	for len(b) < n {
		switch k := 1 + rnd.IntN(3000); rnd.IntN(5) {
		case 0:
			for range k / 8 {
				b = fmt.Appendf(b, "file %d of %d\n", rnd.IntN(100), k)
			}
		case 1:
			for range k {
				b = append(b, byte(rnd.Uint32()))
			}
		case 2:
			b = append(b, make([]byte, k*4)...)
		case 3:
			b = append(b, bytes.Repeat([]byte("abcdefghijklmnopqrst")[:1+rnd.IntN(20)], 1+k/10)...)
		default:
			from := rnd.IntN(len(b) + 1)
			b = append(b, b[from:min(len(b), from+k)]...)
		}
	}
	return b[:n]
}

// members is plain as many gzip members with all kinds of headers.
func members(t *testing.T, plain []byte, size int) []byte {
	t.Helper()
	var b bytes.Buffer
	for i := 0; i < len(plain); i += size {
		w := stdgzip.NewWriter(&b)
		switch i / size % 4 {
		case 1:
			w.Name = "name"
		case 2:
			w.Extra, w.Comment = bytes.Repeat([]byte{7}, 1000), "comment"
		case 3: // and an empty one
			b.Write(compress(t, nil, 6))
		}
		if _, err := w.Write(plain[i:min(len(plain), i+size)]); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// flushed is plain with an empty stored block after every few bytes.
func flushed(t *testing.T, plain []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w := stdgzip.NewWriter(&b)
	for i := 0; i < len(plain); i += 5000 {
		if _, err := w.Write(plain[i:min(len(plain), i+5000)]); err != nil {
			t.Fatal(err)
		}
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestRead(t *testing.T) {
	plain := mixed(1 << 20)
	type blob struct {
		name string
		gz   []byte
	}
	blobs := []blob{
		{"members", members(t, plain, 300_000)},
		{"small members", members(t, plain, 7_000)},
		{"flushes", flushed(t, plain)},
	}
	for level := stdgzip.HuffmanOnly; level <= stdgzip.BestCompression; level++ {
		blobs = append(blobs, blob{fmt.Sprint("standard level ", level), compress(t, plain, level)})
		var b bytes.Buffer
		w, err := kgzip.NewWriterLevel(&b, level)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(plain); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		blobs = append(blobs, blob{fmt.Sprint("klauspost level ", level), b.Bytes()})
	}
	for _, b := range blobs {
		t.Run(b.name, func(t *testing.T) {
			checkStream(t, b.gz, plain)
			checkRanges(t, b.gz, plain)
		})
	}
}

func checkStream(t *testing.T, gz, plain []byte) {
	t.Helper()
	for _, src := range []io.Reader{bytes.NewReader(gz), iotest.HalfReader(iotest.DataErrReader(bytes.NewReader(gz)))} {
		got, err := io.ReadAll(new(Pool).NewReader(src))
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, plain) {
			t.Fatal("other bytes than were compressed")
		}
	}
}

func checkRanges(t *testing.T, gz, plain []byte) {
	t.Helper()
	const span = 64 << 10
	points := record(t, gz, span)
	for i, c := range points {
		if len(c.Window) > windowSize || i > 0 && (c.Out <= points[i-1].Out || c.Bit <= points[i-1].Bit) {
			t.Fatalf("checkpoint %d: bit %d, out %d, window %d", i, c.Bit, c.Out, len(c.Window))
		}
	}
	// Encoders write blocks of up to some 64 KiB compressed; the most plain
	// bytes they stood for here is far below 4 spans.
	if least := len(plain) / (4 * span); len(points) < least || points[0].Out != 0 {
		t.Fatalf("%d checkpoints, want %d or more", len(points), least)
	}
	var pool Pool
	rnd := newRand()
	for range 25 {
		n := 1 + rnd.IntN(100_000)
		off := rnd.IntN(len(plain) - n)
		got := make([]byte, n)
		if err := readAt(&pool, gz, points, got, int64(off)); err != nil {
			t.Fatalf("read %d+%d: %v", off, n, err)
		}
		if !bytes.Equal(got, plain[off:off+n]) {
			t.Fatalf("read %d+%d: other bytes than were compressed", off, n)
		}
	}
}

func TestReadBytewise(t *testing.T) {
	plain := mixed(50_000)
	got, err := io.ReadAll(new(Pool).NewReader(iotest.OneByteReader(bytes.NewReader(compress(t, plain, 6)))))
	if err != nil || !bytes.Equal(got, plain) {
		t.Fatalf("%d bytes, %v", len(got), err)
	}
}

func TestReadTruncated(t *testing.T) {
	gz := members(t, mixed(4000), 1500)
	whole := map[int]bool{}
	for i := range gz { // the cuts between members are valid blobs
		if r, err := stdgzip.NewReader(bytes.NewReader(gz[:i])); err == nil {
			_, err = io.Copy(io.Discard, r)
			whole[i] = err == nil
		}
	}
	for i := range gz {
		_, err := io.Copy(io.Discard, new(Pool).NewReader(bytes.NewReader(gz[:i])))
		if whole[i] != (err == nil) || err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut at %d of %d: %v", i, len(gz), err)
		}
	}
}

func TestReadSourceError(t *testing.T) {
	broken := errors.New("connection reset")
	gz := compress(t, mixed(200_000), 6)
	for _, n := range []int{0, 5, 1000, len(gz) - 4} {
		src := io.MultiReader(bytes.NewReader(gz[:n]), iotest.ErrReader(broken))
		if _, err := io.Copy(io.Discard, new(Pool).NewReader(src)); !errors.Is(err, broken) {
			t.Errorf("source fails after %d bytes: %v", n, err)
		}
	}
}

// TestResumeAllocations holds that a range read does not make a decoder anew.
func TestResumeAllocations(t *testing.T) {
	plain := mixed(1 << 20)
	gz := compress(t, plain, 6)
	points := record(t, gz, 64<<10)
	var pool Pool
	buf := make([]byte, 4096)
	least := uint64(1 << 62) // the garbage collector may empty the pool at times
	var before, after runtime.MemStats
	for range 20 {
		runtime.ReadMemStats(&before)
		if err := readAt(&pool, gz, points, buf, 500_000); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		least = min(least, after.TotalAlloc-before.TotalAlloc)
	}
	if least > 8<<10 {
		t.Errorf("%d bytes allocated for a read", least)
	}
}

func TestCloseTwice(t *testing.T) {
	r := new(Pool).NewReader(bytes.NewReader(compress(t, []byte("x"), 6)))
	for range 2 {
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := r.Read(make([]byte, 1)); err == nil {
		t.Error("read after close works")
	}
}

// TestCheckpointsAreBounded reads far more plain bytes than maxPoints spans
// have, and every checkpoint that is left still works.
func TestCheckpointsAreBounded(t *testing.T) {
	const span = 16
	var plain, blob bytes.Buffer
	w := stdgzip.NewWriter(&blob)
	for i := range maxPoints * 4 {
		fmt.Fprintf(&plain, "line %d of many that differ\n", i)
		fmt.Fprintf(w, "line %d of many that differ\n", i)
		if err := w.Flush(); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	var pool Pool
	r := pool.NewReader(bytes.NewReader(blob.Bytes()))
	r.Record(span)
	if _, err := io.Copy(io.Discard, r); err != nil {
		t.Fatal(err)
	}
	points := r.Checkpoints()
	if len(points) >= maxPoints || len(points) < maxPoints/4 || points[0].Out != 0 {
		t.Fatalf("%d checkpoints, the first at %d", len(points), points[0].Out)
	}
	for _, c := range points[len(points)/2 : len(points)/2+20] {
		z := pool.Resume(bytes.NewReader(blob.Bytes()[c.Bit/8:]), c)
		got := make([]byte, 100)
		if _, err := io.ReadFull(z, got); err != nil || !bytes.Equal(got, plain.Bytes()[c.Out:c.Out+100]) {
			t.Errorf("from %d: %q, %v", c.Out, got, err)
		}
		z.Close()
	}
}
