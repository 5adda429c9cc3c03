package layer_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// oneTurn is a CPU of which one worker has a turn at a time.
func oneTurn(t testing.TB) *sched.Slots {
	t.Helper()
	s, err := sched.New(sched.Config{})
	if err != nil {
		t.Fatal(err)
	}
	return s.Turns("cpu", 1)
}

// free fails the test when nobody else can have a turn.
func free(t testing.TB, cpu *sched.Slots, when string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	leave, err := cpu.Enter(ctx)
	if err != nil {
		t.Errorf("%s somebody has the turn: %v", when, err)
	}
	leave()
}

// waits calls check whenever it is read.
type waits struct {
	io.Reader
	check func()
}

func (w *waits) Read(p []byte) (int, error) {
	w.check()
	return w.Reader.Read(p)
}

// TestBuildInTurns builds layers with one turn for all stages: each computes, and nobody
// has it while the blob or the segment is waited for.
func TestBuildInTurns(t *testing.T) {
	for name, blob := range map[string][]byte{"tar": sampleTar(), "gzip": sampleGzip(), "zstd": zstdFrames(sampleTar(), len(sampleTar()))} {
		t.Run(name, func(t *testing.T) {
			cpu := oneTurn(t)
			var want, got segmentBuffer
			plain, err := layer.Build(t.Context(), bytes.NewReader(blob), describe(blob), &want, layer.Options{})
			if err != nil {
				t.Fatal(err)
			}
			src := &waits{bytes.NewReader(blob), func() { free(t, cpu, "while the blob is read") }}
			dst := &checkedSegment{&got, func() { free(t, cpu, "while the segment is written") }}
			made, err := layer.Build(t.Context(), src, describe(blob), dst, layer.Options{CPU: cpu})
			if err != nil {
				t.Fatal(err)
			}
			if made.DiffID != plain.DiffID || !bytes.Equal(got.Bytes(), want.Bytes()) {
				t.Error("the layer is another one than without turns")
			}
			free(t, cpu, "in the end")
		})
	}
}

// checkedSegment calls check before it is written to.
type checkedSegment struct {
	*segmentBuffer
	check func()
}

func (s *checkedSegment) Write(p []byte) (int, error) {
	s.check()
	return s.segmentBuffer.Write(p)
}

func (s *checkedSegment) WriteZeros(n int64) error {
	s.check()
	return s.segmentBuffer.WriteZeros(n)
}

// askedBlob calls check when it is asked for bytes, and when they are read.
type askedBlob struct {
	layer.Blob
	check func()
}

func (b askedBlob) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	b.check()
	body, err := b.Blob.ReadRange(ctx, off, n)
	return struct {
		io.Reader
		io.Closer
	}{&waits{body, b.check}, body}, err
}

// TestReadInTurns reads layers with one turn, which nobody has while a blob is waited
// for, or while the reader of the stream does something else.
func TestReadInTurns(t *testing.T) {
	gz := sampleGzip()
	var seg segmentBuffer
	built, err := layer.Build(t.Context(), bytes.NewReader(gz), describe(gz), &seg, layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	pieces := manyPieces(t)
	packed := pieces.finish(t)
	packedBlobs, _ := pieces.open()
	want, err := readAll(t, packed, packedBlobs)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		l     *index.Layer
		blobs layer.Blobs
		want  []byte
	}{
		"gzip":    {built, layer.OneBlob(&memoryBlob{data: gz}), seg.Bytes()},
		"chunked": {packed, packedBlobs, want},
	} {
		t.Run(name, func(t *testing.T) {
			cpu := oneTurn(t)
			blobs := func(ref index.BlobRef) layer.Blob {
				return askedBlob{c.blobs(ref), func() { free(t, cpu, "while the blob is waited for") }}
			}
			r, err := layer.NewReader(c.l, blobs).Under(cpu).Open(t.Context(), 0, c.l.Table.Size)
			if err != nil {
				t.Fatal(err)
			}
			defer r.Close()
			got, p := []byte(nil), make([]byte, 100_000)
			for err == nil {
				var n int
				n, err = r.Read(p)
				got = append(got, p[:n]...)
				free(t, cpu, "between two reads")
			}
			if !errors.Is(err, io.EOF) || !bytes.Equal(got, c.want) {
				t.Errorf("%d of %d bytes, the same %v, %v", len(got), len(c.want), bytes.Equal(got, c.want), err)
			}
		})
	}
}

// TestReadGivesUpItsTurn has the reader of a layer leave who waits for the CPU.
func TestReadGivesUpItsTurn(t *testing.T) {
	gz := sampleGzip()
	l, err := layer.Build(t.Context(), bytes.NewReader(gz), describe(gz), layer.Discard, layer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	cpu := oneTurn(t)
	leave, err := cpu.Enter(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	r, err := layer.NewReader(l, layer.OneBlob(&memoryBlob{data: gz})).Under(cpu).Open(ctx, 0, l.Table.Size)
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if _, err := r.Read(make([]byte, 10)); !errors.Is(err, context.Canceled) {
		t.Errorf("read: %v", err)
	}
	if _, err := layer.Build(ctx, bytes.NewReader(gz), describe(gz), layer.Discard, layer.Options{CPU: cpu}); !errors.Is(err, context.Canceled) {
		t.Errorf("build: %v", err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	leave()
	free(t, cpu, "in the end")
}
