package layer_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/tests/torture"
)

// sparseTar is a tar by GNU tar of files with holes, in the given format.
func sparseTar(t *testing.T, args ...string) []byte {
	t.Helper()
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skip("needs GNU tar: ", err)
	}
	dir := t.TempDir()
	for name, holes := range map[string]int{"few": 2, "many": 60} {
		f, err := os.Create(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		for i := range holes {
			if _, err := f.WriteAt(content(5000), int64(i)<<18+12345); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(f.Truncate(20<<20), f.Close()); err != nil {
			t.Fatal(err)
		}
	}
	b, err := exec.CommandContext(t.Context(), "tar", append(args, "-C", dir, "-cS", ".")...).Output()
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// TestDiffID makes tars again out of segments.
func TestDiffID(t *testing.T) {
	tars := append(torture.Layers(), torture.Divergent()...)
	tars = append(tars, torture.Large(500), sampleTar(), append(sampleTar(), make([]byte, 5000)...), make([]byte, 1024))
	for _, format := range []string{"gnu", "pax"} {
		tars = append(tars, sparseTar(t, "--format="+format))
	}
	for _, version := range []string{"0.0", "0.1", "1.0"} {
		tars = append(tars, sparseTar(t, "--format=pax", "--sparse-version="+version))
	}
	for i, plain := range tars {
		for _, blob := range [][]byte{plain, compress(plain, 2), zstdFrames(plain, 100_000)} {
			checkDiffID(t, i, plain, blob)
		}
	}
}

func checkDiffID(t *testing.T, i int, plain, blob []byte) {
	t.Helper()
	var seg bytes.Buffer
	l, err := layer.Build(t.Context(), bytes.NewReader(blob), describe(blob), &seg, layer.Options{Skeleton: true})
	if err != nil {
		t.Fatal(err)
	}
	if err := l.Validate(); err != nil {
		t.Fatal(err)
	}
	data := int64(0)
	for _, x := range l.Access.Extents {
		data += x.Len
	}
	if int64(len(l.Skeleton))+data != int64(len(plain)) || l.DiffID != digest.FromBytes(plain) {
		t.Fatalf("tar %d: skeleton of %d bytes beside %d of %d; diffID %s", i, len(l.Skeleton), data, len(plain), l.DiffID)
	}
	got, err := layer.DiffID(t.Context(), l, bytes.NewReader(seg.Bytes()))
	if err != nil || got != l.DiffID {
		t.Fatalf("tar %d: digest %s, want %s; %v", i, got, l.DiffID, err)
	}
	for _, x := range l.Access.Extents[:min(3, len(l.Access.Extents))] {
		changed := bytes.Clone(seg.Bytes())
		changed[x.Seg+x.Len-1] ^= 1
		if got, err := layer.DiffID(t.Context(), l, bytes.NewReader(changed)); err != nil || got == l.DiffID {
			t.Fatalf("tar %d: digest %s of a segment that was changed, %v", i, got, err)
		}
	}
}

func TestDiffIDErrors(t *testing.T) {
	blob := sampleGzip()
	var seg bytes.Buffer
	l, err := layer.Build(t.Context(), bytes.NewReader(blob), describe(blob), &seg, layer.Options{Skeleton: true})
	if err != nil {
		t.Fatal(err)
	}
	with := func(change func(l *index.Layer)) *index.Layer {
		c := *l
		c.Access.Extents = slices.Clone(l.Access.Extents)
		change(&c)
		return &c
	}
	segment := bytes.NewReader(seg.Bytes())
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	for _, c := range []struct {
		name    string
		ctx     context.Context
		layer   *index.Layer
		segment io.ReaderAt
		is      func(error) bool
	}{
		{"no skeleton", t.Context(), with(func(l *index.Layer) { l.Skeleton = nil }), segment, errdefs.IsNotFound},
		{"short skeleton", t.Context(), with(func(l *index.Layer) { l.Skeleton = l.Skeleton[:2000] }), segment, errdefs.IsInvalidArgument},
		{"overlap", t.Context(), with(func(l *index.Layer) { l.Access.Extents[3].Tar = l.Access.Extents[2].Tar }), segment, errdefs.IsInvalidArgument},
		{"short segment", t.Context(), l, bytes.NewReader(seg.Bytes()[:100_000]), func(err error) bool { return errors.Is(err, io.ErrUnexpectedEOF) }},
		{"cancelled", cancelled, l, segment, func(err error) bool { return errors.Is(err, context.Canceled) }},
	} {
		if got, err := layer.DiffID(c.ctx, c.layer, c.segment); err == nil || !c.is(err) {
			t.Errorf("%s: %s, %v", c.name, got, err)
		}
	}
	// The order of the segment need not be that of the tar.
	turned := with(func(l *index.Layer) { slices.Reverse(l.Access.Extents) })
	if got, err := layer.DiffID(t.Context(), turned, segment); err != nil || got != l.DiffID {
		t.Errorf("extents in another order: %s, %v", got, err)
	}
	plain, err := layer.Build(t.Context(), bytes.NewReader(blob), describe(blob), io.Discard, layer.Options{})
	if err != nil || plain.Skeleton != nil {
		t.Errorf("skeleton of %d bytes that was not asked for, %v", len(plain.Skeleton), err)
	}
}
