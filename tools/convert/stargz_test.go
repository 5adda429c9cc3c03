package convert_test

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	plainlayer "github.com/tatami-containers/tatami/rootfs/layer"
	ours "github.com/tatami-containers/tatami/rootfs/layer/estargz"
	"github.com/tatami-containers/tatami/tools/convert"
)

func openStargz(t *testing.T, r result) *estargz.Reader {
	t.Helper()
	e, err := estargz.Open(io.NewSectionReader(bytes.NewReader(r.blob), 0, int64(len(r.blob))),
		estargz.WithDecompressors(new(estargz.GzipDecompressor), new(zstdchunked.Decompressor)))
	if err != nil {
		t.Fatal(err)
	}
	return e
}

var stargzCases = map[string]convert.Options{
	"estargz":       {Format: convert.EStargz},
	"estargz small": {Format: convert.EStargz, ChunkSize: 100_000, Level: 1},
	"estargz pack":  {Format: convert.EStargz, ChunkSize: 100_000, Pack: 300_000, Level: 1},
	"zstd":          {Format: convert.ZstdStargz},
	"zstd pack":     {Format: convert.ZstdStargz, ChunkSize: 100_000, Pack: 300_000},
}

// TestStargz reads blobs with stargz-snapshotter's library.
func TestStargz(t *testing.T) {
	for name, opts := range stargzCases {
		t.Run(name, func(t *testing.T) {
			r := layer(t, base(), opts)
			e := openStargz(t, r)
			toc := digest.Digest(r.Descriptor.Annotations[estargz.TOCJSONDigestAnnotation])
			if e.TOCDigest() != toc || r.TOC != toc {
				t.Errorf("TOC of digest %s, said to be %s and %s", e.TOCDigest(), toc, r.TOC)
			}
			if opts.Pack == 0 { // its VerifyTOC takes one chunk for each member only
				if _, err := e.VerifyTOC(toc); err != nil {
					t.Error(err)
				}
			}
			if _, ok := e.Lookup(".no.prefetch.landmark"); !ok {
				t.Error("no landmark")
			}
			n := 0
			walk(base(), func(h *tar.Header, data []byte) {
				n++
				checkStargz(t, e, h, data)
			})
			if n < 1000 {
				t.Errorf("only %d entries", n)
			}
		})
	}
}

// checkStargz compares one entry, its chunks and its content.
func checkStargz(t *testing.T, e *estargz.Reader, h *tar.Header, data []byte) {
	t.Helper()
	got, ok := e.Lookup(h.Name)
	if !ok {
		t.Fatalf("%q is not there", h.Name)
	}
	if h.Typeflag == tar.TypeLink {
		want, _ := e.Lookup(h.Linkname)
		if got != want {
			t.Errorf("%s is no link to %s", h.Name, h.Linkname)
		}
		return
	}
	if got.UID != h.Uid || got.GID != h.Gid || got.Mode != h.Mode || got.LinkName != h.Linkname || !got.ModTime().Equal(h.ModTime) ||
		int64(got.DevMajor) != h.Devmajor || int64(got.DevMinor) != h.Devminor || got.Size != h.Size {
		t.Errorf("%s is %+v, want %+v", h.Name, got, h)
	}
	for k, v := range h.PAXRecords {
		if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok && string(got.Xattrs[name]) != v {
			t.Errorf("%s: attribute %s is %q", h.Name, name, got.Xattrs[name])
		}
	}
	if h.Typeflag != tar.TypeReg {
		return
	}
	f, err := e.OpenFile(h.Name)
	if err != nil {
		t.Fatal(err)
	}
	content, err := io.ReadAll(f)
	if err != nil || !bytes.Equal(content, data) || got.Digest != digest.FromBytes(data).String() {
		t.Errorf("%s: %d bytes that are not its %d, %v", h.Name, len(content), len(data), err)
	}
	for off := int64(0); off < h.Size; {
		c, ok := e.ChunkEntryForOffset(h.Name, off)
		if !ok || c.ChunkOffset != off || c.ChunkDigest != digest.FromBytes(data[off:off+c.ChunkSize]).String() {
			t.Fatalf("%s: chunk at %d is %+v", h.Name, off, c)
		}
		off += c.ChunkSize
	}
}

// memory is a blob in memory.
type memory []byte

func (m memory) Size() int64 { return int64(len(m)) }

func (m memory) ReadRange(_ context.Context, off, n int64) (io.ReadCloser, error) {
	return io.NopCloser(io.NewSectionReader(bytes.NewReader(m), off, n)), nil
}

// TestOurs reads eStargz blobs with our own reader: every entry is that of the
// plain layer, and every chunk has its digest.
func TestOurs(t *testing.T) {
	want := build(t, base())
	for name, opts := range stargzCases {
		if opts.Format != convert.EStargz {
			continue
		}
		t.Run(name, func(t *testing.T) {
			r := layer(t, base(), opts)
			l, err := ours.Open(t.Context(), memory(r.blob), r.Descriptor, r.TOC)
			if err != nil {
				t.Fatal(err)
			}
			checkOurs(t, l, memory(r.blob), want)
		})
	}
}

func build(t *testing.T, plain []byte) *index.Layer {
	t.Helper()
	l, err := plainlayer.Build(t.Context(), bytes.NewReader(plain), plainlayer.Descriptor{Digest: digest.FromBytes(plain), Size: int64(len(plain))}, io.Discard, plainlayer.Options{})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

func checkOurs(t *testing.T, l *index.Layer, b memory, want *index.Layer) {
	t.Helper()
	if len(l.Entries) != len(want.Entries) || l.Table.Size != want.Table.Size {
		t.Fatalf("%d entries, %d bytes; want %d, %d", len(l.Entries), l.Table.Size, len(want.Entries), want.Table.Size)
	}
	for i, e := range l.Entries {
		if g, w := fmt.Sprintf("%+v", e), fmt.Sprintf("%+v", want.Entries[i]); g != w {
			t.Errorf("entry\n got %s\nwant %s", g, w)
		}
	}
	s, err := plainlayer.NewReader(l, plainlayer.OneBlob(b)).Open(t.Context(), 0, l.Table.Size)
	if err != nil {
		t.Fatal(err)
	}
	seg, err := io.ReadAll(s)
	if err != nil {
		t.Fatal(err)
	}
	for i, c := range l.Table.Chunks {
		if got := sha256.Sum256(seg[c.Off:c.End()]); !bytes.Equal(got[:], c.Sum[:]) {
			t.Fatalf("chunk %d has digest %s", i, hex.EncodeToString(got[:]))
		}
	}
}

// TestPackSaves holds what packing is for.
func TestPackSaves(t *testing.T) {
	alone := layer(t, base(), convert.Options{Format: convert.EStargz})
	packed := layer(t, base(), convert.Options{Format: convert.EStargz, Pack: 1 << 20})
	if len(packed.blob) >= len(alone.blob) {
		t.Errorf("%d bytes packed, %d alone", len(packed.blob), len(alone.blob))
	}
}
