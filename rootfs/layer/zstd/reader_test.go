package zstd

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sort"
	"strings"
	"sync"
	"testing"
	"testing/iotest"

	"github.com/containerd/errdefs"
	kzstd "github.com/klauspost/compress/zstd"

	"github.com/tatami-containers/tatami/rootfs/index"
)

func newRand() *rand.Rand { return rand.New(rand.NewPCG(1, 2)) }

// mixed is n bytes of text, noise, zeros and what came before.
func mixed(n int) []byte {
	rnd := newRand()
	var b []byte
	for len(b) < n {
		switch k := 1 + rnd.IntN(3000); rnd.IntN(4) {
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
		default:
			from := rnd.IntN(len(b) + 1)
			b = append(b, b[from:min(len(b), from+k)]...)
		}
	}
	return b[:n]
}

var encoder = sync.OnceValue(func() *kzstd.Encoder {
	e, err := kzstd.NewWriter(nil, kzstd.WithZeroFrames(true))
	if err != nil {
		panic(err)
	}
	return e
})

// frame is plain as one frame.
func frame(plain []byte) []byte { return encoder().EncodeAll(plain, nil) }

// manyFrames is plain in frames of up to n bytes.
func manyFrames(plain []byte, n int) []byte {
	var b []byte
	for part := range slices.Chunk(plain, n) {
		b = encoder().EncodeAll(part, b)
	}
	return b
}

// skippable is a frame to be skipped with n bytes in it.
func skippable(kind byte, n int) []byte {
	b := []byte{0x50 + kind, 0x2a, 0x4d, 0x18}
	b = binary.LittleEndian.AppendUint32(b, uint32(n))
	return append(b, bytes.Repeat([]byte{0x28}, n)...)
}

// seekable is plain in the zstd seekable format (contrib/seekable_format in
// zstd's sources): frames of up to n bytes, then a seek table in a skippable
// frame, which ends in the number of frames, a descriptor and a magic number.
func seekable(plain []byte, n int) []byte {
	var b, table []byte
	frames := uint32(0)
	for part := range slices.Chunk(plain, n) {
		packed := frame(part)
		table = binary.LittleEndian.AppendUint32(table, uint32(len(packed)))
		table = binary.LittleEndian.AppendUint32(table, uint32(len(part)))
		b = append(b, packed...)
		frames++
	}
	table = binary.LittleEndian.AppendUint32(table, frames)
	table = append(table, 0)
	table = binary.LittleEndian.AppendUint32(table, 0x8f92eab1)
	b = binary.LittleEndian.AppendUint32(b, 0x184d2a5e)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(table)))
	return append(b, table...)
}

// tool compresses plain with a program of Debian's package zstd.
func tool(t *testing.T, plain []byte, name string, args ...string) []byte {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skipf("no %s: install Debian's package zstd", name)
	}
	in := filepath.Join(t.TempDir(), "plain")
	if err := os.WriteFile(in, plain, 0o600); err != nil {
		t.Fatal(err)
	}
	out := in + ".zst"
	args = append(args, "-q", in, "-o", out)
	run(t, exec.CommandContext(t.Context(), name, args...))
	b, err := os.ReadFile(out)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// run runs a command and returns its output.
func run(t *testing.T, cmd *exec.Cmd) []byte {
	t.Helper()
	var complaint bytes.Buffer
	cmd.Stderr = &complaint
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v: %v: %s", cmd.Args, err, &complaint)
	}
	return out
}

// record streams a blob once and returns its checkpoints.
func record(t testing.TB, blob, plain []byte, span int64) []index.Checkpoint {
	t.Helper()
	r := NewReader(bytes.NewReader(blob))
	defer r.Close()
	r.Record(span)
	got, err := io.ReadAll(r)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, plain) {
		t.Fatalf("%d other bytes than the %d that were compressed", len(got), len(plain))
	}
	return r.Checkpoints()
}

// readAt fills p from plain offset off, and gives the decoder only the
// compressed bytes up to the checkpoint behind the range.
func readAt(pool *Pool, blob []byte, points []index.Checkpoint, p []byte, off int64) error {
	i := sort.Search(len(points), func(i int) bool { return points[i].Out > off }) - 1
	end := len(blob)
	for _, c := range points[i+1:] {
		if c.Out >= off+int64(len(p)) {
			end = int(c.Bit / 8)
			break
		}
	}
	r := pool.Resume(bytes.NewReader(blob[points[i].Bit/8:end]), points[i])
	if err := r.Discard(off - points[i].Out); err != nil {
		return err
	}
	if _, err := io.ReadFull(r, p); err != nil {
		return err
	}
	return r.Close()
}

func checkRanges(t *testing.T, blob, plain []byte, points []index.Checkpoint) {
	t.Helper()
	var pool Pool
	rnd := newRand()
	for range 25 {
		n := 1 + rnd.IntN(min(len(plain)-1, 100_000))
		off := rnd.IntN(len(plain) - n)
		got := make([]byte, n)
		if err := readAt(&pool, blob, points, got, int64(off)); err != nil {
			t.Fatalf("read %d+%d: %v", off, n, err)
		}
		if !bytes.Equal(got, plain[off:off+n]) {
			t.Fatalf("read %d+%d: other bytes than were compressed", off, n)
		}
	}
}

func TestRead(t *testing.T) {
	plain := mixed(1 << 20)
	for _, c := range []struct {
		name   string
		blob   []byte
		points int // how many checkpoints 100 000 bytes apart
	}{
		{"one frame", frame(plain), 1},
		{"frames", manyFrames(plain, 100_000), 11},
		{"small frames", manyFrames(plain, 1000), 11},
		{"skippable frames", slices.Concat(skippable(0, 0), frame(plain[:500_000]), skippable(7, 300_000), frame(plain[500_000:]), skippable(15, 1)), 2},
		{"empty frames", slices.Concat(frame(nil), frame(nil), frame(plain), frame(nil)), 2},
		{"seekable", seekable(plain, 200_000), 6},
	} {
		t.Run(c.name, func(t *testing.T) {
			points := record(t, c.blob, plain, 100_000)
			if len(points) != c.points || points[0].Out != 0 {
				t.Errorf("%d checkpoints, want %d", len(points), c.points)
			}
			checkRanges(t, c.blob, plain, points)
			for _, src := range []io.Reader{iotest.OneByteReader(bytes.NewReader(c.blob)), iotest.DataErrReader(bytes.NewReader(c.blob))} {
				if got, err := io.ReadAll(new(Pool).Resume(src, index.Checkpoint{})); err != nil || !bytes.Equal(got, plain) {
					t.Errorf("%d bytes, %v", len(got), err)
				}
			}
		})
	}
}

// TestReadTools reads what zstd and pzstd write.
func TestReadTools(t *testing.T) {
	plain := mixed(5 << 20)
	for _, c := range []struct {
		args   string
		points int // at least
	}{
		{"zstd -3", 1},
		{"zstd -3 --no-check", 1},
		{"zstd -19", 1},
		{"zstd -3 --long=27", 1},
		{"zstd -3 --long=27 --no-content-size", 1},
		{"zstd --ultra -22", 1},
		{"zstd -1 -T2 -B1MiB", 1},
		{"pzstd -1 -p 4", 2},
	} {
		t.Run(c.args, func(t *testing.T) {
			args := strings.Fields(c.args)
			blob := tool(t, plain, args[0], args[1:]...)
			points := record(t, blob, plain, 100_000)
			if len(points) < c.points {
				t.Errorf("%d checkpoints, want %d or more", len(points), c.points)
			}
			checkRanges(t, blob, plain, points)
		})
	}
	t.Run("empty", func(t *testing.T) { record(t, tool(t, nil, "zstd"), nil, 1) })
	t.Run("frames", func(t *testing.T) {
		blob := append(tool(t, plain[:5000], "zstd"), tool(t, plain[5000:], "zstd", "-1")...)
		if points := record(t, blob, plain, 1); len(points) != 2 || points[1].Out != 5000 {
			t.Errorf("checkpoints %v", points)
		}
	})
	t.Run("window of 256 MiB", func(t *testing.T) {
		tool(t, nil, "zstd") // or skip
		cmd := exec.CommandContext(t.Context(), "zstd", "-1", "--long=28", "-c")
		cmd.Stdin = bytes.NewReader(plain[:5000]) // of unknown size: zstd keeps the window
		blob := run(t, cmd)
		_, err := io.Copy(io.Discard, NewReader(bytes.NewReader(blob)))
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "--long=27") {
			t.Errorf("error %v", err)
		}
	})
}

func TestReadTruncated(t *testing.T) {
	blob := slices.Concat(manyFrames(mixed(4000), 1500), skippable(3, 10))
	whole := map[int]bool{0: false}
	for i := 1; i < len(blob); i++ { // the cuts between frames are valid blobs
		z, err := kzstd.NewReader(nil)
		if err != nil {
			t.Fatal(err)
		}
		_, err = z.DecodeAll(blob[:i], nil)
		whole[i] = err == nil
		z.Close()
	}
	valid := 0
	for i := range blob {
		r := NewReader(bytes.NewReader(blob[:i]))
		_, err := io.Copy(io.Discard, r)
		r.Close()
		if whole[i] != (err == nil) || err != nil && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("cut at %d of %d: %v", i, len(blob), err)
		}
		if err == nil {
			valid++
		}
	}
	if valid != 3 {
		t.Errorf("%d cuts are valid", valid)
	}
}

func TestReadCorrupt(t *testing.T) {
	blob := manyFrames(mixed(200_000), 50_000)
	wrongSum := bytes.Clone(blob)
	wrongSum[len(blob)-1] ^= 1
	reserved := bytes.Clone(blob)
	reserved[4] |= 1 << 3
	dictionary := []byte{0x28, 0xb5, 0x2f, 0xfd, 0x21, 7, 0, 1, 0, 0}
	for name, b := range map[string][]byte{
		"checksum":         wrongSum,
		"reserved bit":     reserved,
		"trailing garbage": append(bytes.Clone(blob), "garbage"...),
		"trailing zeros":   append(bytes.Clone(blob), make([]byte, 512)...),
		"reserved block":   {0x28, 0xb5, 0x2f, 0xfd, 0, 0x58, 7, 0, 0},
		"dictionary":       dictionary,
		"large block":      {0x28, 0xb5, 0x2f, 0xfd, 0, 0x58, 0xff, 0xff, 0xff},
	} {
		for _, r := range []*Reader{NewReader(bytes.NewReader(b)), new(Pool).Resume(bytes.NewReader(b), index.Checkpoint{})} {
			_, err := io.Copy(io.Discard, r)
			if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "byte") {
				t.Errorf("%s: %v", name, err)
			}
			if _, again := r.Read(make([]byte, 1)); !errors.Is(again, err) {
				t.Errorf("%s: then %v", name, again)
			}
			r.Close()
		}
	}
}

func TestReadSourceError(t *testing.T) {
	broken := errors.New("connection reset")
	blob := manyFrames(mixed(200_000), 70_000)
	for _, n := range []int{0, 3, 5, 1000, len(blob) - 4} {
		src := io.MultiReader(bytes.NewReader(blob[:n]), iotest.ErrReader(broken))
		r := NewReader(src)
		if _, err := io.Copy(io.Discard, r); !errors.Is(err, broken) {
			t.Errorf("source fails after %d bytes: %v", n, err)
		}
		r.Close()
	}
}

// TestClose holds that decoders leave nothing behind.
func TestClose(t *testing.T) {
	blob := frame(mixed(4 << 20))
	before := runtime.NumGoroutine()
	for range 20 {
		r := NewReader(bytes.NewReader(blob))
		if _, err := io.ReadFull(r, make([]byte, 1000)); err != nil {
			t.Fatal(err)
		}
		for range 2 {
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := r.Read(make([]byte, 1)); err == nil {
			t.Error("read after close works")
		}
	}
	if n := runtime.NumGoroutine(); n > before+5 {
		t.Errorf("%d goroutines more", n-before)
	}
}

// TestResumeAllocations holds that a range read does not make a decoder anew.
func TestResumeAllocations(t *testing.T) {
	plain := mixed(1 << 20)
	blob := manyFrames(plain, 64<<10)
	points := record(t, blob, plain, 64<<10)
	var pool Pool
	buf := make([]byte, 4096)
	least := uint64(1 << 62) // the garbage collector may empty the pool at times
	var before, after runtime.MemStats
	for range 20 {
		runtime.ReadMemStats(&before)
		if err := readAt(&pool, blob, points, buf, 500_000); err != nil {
			t.Fatal(err)
		}
		runtime.ReadMemStats(&after)
		least = min(least, after.TotalAlloc-before.TotalAlloc)
	}
	if least > 8<<10 {
		t.Errorf("%d bytes allocated for a read", least)
	}
}

// TestCheckpointsAreBounded reads more frames than checkpoints are kept, and
// those that are left still work.
func TestCheckpointsAreBounded(t *testing.T) {
	var plain, blob []byte
	for i := range maxPoints + 5000 {
		line := fmt.Appendf(nil, "line %d of many that differ\n", i)
		plain = append(plain, line...)
		blob = encoder().EncodeAll(line, blob)
	}
	points := record(t, blob, plain, 1)
	if len(points) >= maxPoints || len(points) < maxPoints/2 || points[0].Out != 0 {
		t.Fatalf("%d checkpoints, the first at %d", len(points), points[0].Out)
	}
	checkRanges(t, blob, plain, points)
}

func addSeeds(f *testing.F) {
	plain := mixed(3000)
	for _, b := range [][]byte{
		nil, frame(nil), frame(plain), manyFrames(plain, 700), seekable(plain, 1000),
		slices.Concat(skippable(1, 20), frame(plain), skippable(2, 0)),
		{0x28, 0xb5, 0x2f, 0xfd, 0x21, 7, 0, 1, 0, 0}, {0x28, 0xb5, 0x2f, 0xfd, 0, 0xff, 1, 0, 0},
		{0x28, 0xb5, 0x2f, 0xfd, 0, 0x58, 3, 0xff, 0xff, 'x'},
	} {
		f.Add(b)
	}
}

// fuzzLimit is how many plain bytes of a fuzzed blob are looked at.
const fuzzLimit = 16 << 20

// FuzzReader holds that a blob means what klauspost's decoder of whole streams
// says, from its start and from every checkpoint.
func FuzzReader(f *testing.F) {
	addSeeds(f)
	oracle, err := kzstd.NewReader(nil, kzstd.WithDecoderMaxWindow(MaxWindow), kzstd.WithDecoderConcurrency(1))
	if err != nil {
		f.Fatal(err)
	}
	var pool Pool
	f.Fuzz(func(t *testing.T, blob []byte) {
		if err := oracle.Reset(io.MultiReader(bytes.NewReader(blob))); err != nil {
			t.Fatal(err)
		}
		want, wantErr := io.ReadAll(io.LimitReader(oracle, fuzzLimit))
		if len(want) == fuzzLimit {
			return
		}
		r := pool.Resume(bytes.NewReader(blob), index.Checkpoint{})
		defer r.Close()
		r.Record(1)
		got, err := io.ReadAll(r)
		if (err == nil) != (wantErr == nil && len(blob) > 0) {
			t.Fatalf("error %v, klauspost's %v", err, wantErr)
		}
		if err != nil && !errdefs.IsDataLoss(err) && !errdefs.IsInvalidArgument(err) && !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Fatalf("error without a class: %v", err)
		}
		if err != nil {
			return
		}
		if !bytes.Equal(got, want) {
			t.Fatal("other bytes than klauspost's")
		}
		for _, c := range r.Checkpoints() {
			part := pool.Resume(bytes.NewReader(blob[c.Bit/8:]), c)
			got, err := io.ReadAll(part)
			if err != nil || !bytes.Equal(got, want[c.Out:]) {
				t.Fatalf("from checkpoint %+v: %d bytes of %d, %v", c, len(got), len(want), err)
			}
			part.Close()
		}
	})
}

// FuzzNewReader holds that decoding with several goroutines makes no
// difference. It is a target of its own because what such code covers varies
// from run to run, which makes fuzzing slow.
func FuzzNewReader(f *testing.F) {
	addSeeds(f)
	var pool Pool
	f.Fuzz(func(t *testing.T, blob []byte) {
		one := pool.Resume(bytes.NewReader(blob), index.Checkpoint{})
		defer one.Close()
		want, wantErr := io.ReadAll(io.LimitReader(one, fuzzLimit))
		many := NewReader(bytes.NewReader(blob))
		defer many.Close()
		got, err := io.ReadAll(io.LimitReader(many, fuzzLimit))
		if (err == nil) != (wantErr == nil) || err == nil && !bytes.Equal(got, want) {
			t.Fatalf("%d bytes, %v; by one goroutine %d, %v", len(got), err, len(want), wantErr)
		}
	})
}

func BenchmarkRead(b *testing.B) {
	plain := mixed(16 << 20)
	for name, blob := range map[string][]byte{"one frame": frame(plain), "frames": manyFrames(plain, 1<<20)} {
		b.Run(name, func(b *testing.B) {
			b.SetBytes(int64(len(plain)))
			for b.Loop() {
				r := NewReader(bytes.NewReader(blob))
				if n, err := io.Copy(io.Discard, r); err != nil || n != int64(len(plain)) {
					b.Fatalf("%d bytes, %v", n, err)
				}
				r.Close()
			}
		})
	}
}
