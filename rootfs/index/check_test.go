package index

import (
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

func TestEntryRefuses(t *testing.T) {
	tests := []struct {
		name  string
		entry Entry
	}{
		{"no kind", Entry{Path: "a"}},
		{"unknown kind", Entry{Path: "a", Kind: Opaque + 1}},
		{"absolute", Entry{Path: "/a", Kind: Dir}},
		{"dot", Entry{Path: "a/./b", Kind: Dir}},
		{"dot dot", Entry{Path: "a/..", Kind: Dir}},
		{"slash at the end", Entry{Path: "a/", Kind: Dir}},
		{"zero byte", Entry{Path: "a\x00", Kind: Dir}},
		{"long name", Entry{Path: strings.Repeat("n", 256), Kind: Dir}},
		{"long path", Entry{Path: strings.Repeat("n/", 2048) + "n", Kind: Dir}},
		{"root as a file", Entry{Kind: File}},
		{"root hidden", Entry{Kind: Whiteout}},
		{"mode", Entry{Path: "a", Kind: Dir, Mode: 0o10000}},
		{"nanoseconds", Entry{Path: "a", Kind: Dir, Nsec: 1e9}},
		{"content unaligned", Entry{Path: "a", Kind: File, Size: 1, Off: 1}},
		{"content behind the end", Entry{Path: "a", Kind: File, Size: 1, Off: 1 << 20}},
		{"content overflows", Entry{Path: "a", Kind: File, Size: 1<<63 - 1, Off: 4096}},
		{"negative size", Entry{Path: "a", Kind: File, Size: -1}},
		{"place of nothing", Entry{Path: "a", Kind: File, Off: 4096}},
		{"content of a directory", Entry{Path: "a", Kind: Dir, Size: 1}},
		{"target of a file", Entry{Path: "a", Kind: File, Link: "b"}},
		{"no target", Entry{Path: "a", Kind: Symlink}},
		{"long target", Entry{Path: "a", Kind: Symlink, Link: strings.Repeat("x", 4096)}},
		{"hard link out", Entry{Path: "a", Kind: Hardlink, Link: "../b"}},
		{"hard link to the root", Entry{Path: "a", Kind: Hardlink}},
		{"device number", Entry{Path: "a", Kind: Char, Major: 4096}},
		{"device number of a file", Entry{Path: "a", Kind: File, Minor: 1}},
		{"attribute order", Entry{Path: "a", Kind: Dir, Xattrs: []Xattr{{"user.b", ""}, {"user.a", ""}}}},
		{"attribute twice", Entry{Path: "a", Kind: Dir, Xattrs: []Xattr{{"user.b", ""}, {"user.b", ""}}}},
		{"attribute name", Entry{Path: "a", Kind: Dir, Xattrs: []Xattr{{strings.Repeat("n", 256), ""}}}},
		{"attribute value", Entry{Path: "a", Kind: Dir, Xattrs: []Xattr{{"user.a", strings.Repeat("v", 65537)}}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.entry.Validate(1 << 20); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%v", err)
			}
		})
	}
}

func TestLayerRefuses(t *testing.T) {
	tests := []struct {
		name  string
		spoil func(*Layer)
	}{
		{"blob digest", func(l *Layer) { l.Blob = "sha256:12" }},
		{"diff ID", func(l *Layer) { l.DiffID = "x" }},
		{"blob size", func(l *Layer) { l.BlobSize = -1 }},
		{"table", func(l *Layer) { l.Table.Size++ }},
		{"entry", func(l *Layer) { l.Entries[3].Path = "/" }},
		{"format", func(l *Layer) { l.Access.Format = 0 }},
		{"checkpoints of a tar", func(l *Layer) { l.Access.Format = Tar }},
		{"pieces of a gzip", func(l *Layer) { l.Access.Pieces = make([]Piece, 3) }},
		{"extents of pieces", func(l *Layer) { l.Access.Format, l.Access.Checkpoints = Chunked, nil }},
		{"too few pieces", func(l *Layer) { l.Access = Access{Format: Chunked} }},
		{"piece out of the blob", func(l *Layer) {
			l.Access = Access{Format: Chunked, Pieces: []Piece{{Len: 1}, {Len: 1}, {Off: 1000, Len: 1}}}
		}},
		{"extent order", func(l *Layer) { l.Access.Extents[1].Seg = 4096 }},
		{"extent out of the segment", func(l *Layer) { l.Access.Extents[2].Len = l.Table.Size }},
		{"extent out of the tar", func(l *Layer) { l.Access.Format, l.Access.Checkpoints = Tar, nil }},
		{"empty extent", func(l *Layer) { l.Access.Extents[1].Len = 0 }},
		{"checkpoint order", func(l *Layer) { l.Access.Checkpoints[1].Bit = 80 }},
		{"checkpoint out of the blob", func(l *Layer) { l.Access.Checkpoints[2].Bit = 8001 }},
		{"checkpoints backwards", func(l *Layer) { l.Access.Checkpoints[2].Out = 3 }},
		{"window too long", func(l *Layer) { l.Access.Checkpoints[2].Window = make([]byte, MaxWindow+1) }},
		{"many checkpoints", func(l *Layer) { l.Access.Checkpoints = make([]Checkpoint, maxCheckpoints+1) }},
		{"many spans", func(l *Layer) { vouched(l, make([]Span, maxSpans+1)...) }},
		{"many ranges", func(l *Layer) { l.Prefetch = make([]Range, MaxPrefetch+1) }},
		{"gzip with spans", func(l *Layer) { l.Access.Spans = []Span{{Len: 1}} }},
		{"sums without spans", func(l *Layer) { l.Table.Algorithm = Vouched }},
		{"span out of the blob", func(l *Layer) { vouched(l, Span{Off: 999, Len: 2}) }},
		{"spans backwards", func(l *Layer) { vouched(l, Span{Off: 5, Len: 5}, Span{Off: 5, Len: 6}) }},
		{"span in a span", func(l *Layer) { vouched(l, Span{Off: 0, Len: 10}, Span{Off: 1, Len: 9}) }},
		{"frame with a window", func(l *Layer) { l.Access.Format = Zstd }},
		{"prefetch behind the end", func(l *Layer) { l.Prefetch = []Range{{l.Table.Size, 1}} }},
		{"prefetch of nothing", func(l *Layer) { l.Prefetch = []Range{{0, 0}} }},
		{"unknown codec", func(l *Layer) { chunked(l).Pieces[1].Codec = Deflate + 1 }},
		{"unknown blob", func(l *Layer) { chunked(l).Pieces[1].Blob = 2 }},
		{"piece out of another blob", func(l *Layer) { chunked(l).Pieces[1] = Piece{Blob: 1, Off: 4999, Len: 2} }},
		{"checkpoint elsewhere", func(l *Layer) { chunked(l).Pieces[2].Off++ }},
		{"checkpoint unknown", func(l *Layer) { chunked(l).Pieces[2].Point = 9 }},
		{"checkpoint for a frame", func(l *Layer) { chunked(l).Pieces[1].Point = 1 }},
		{"blob of no digest", func(l *Layer) { chunked(l).Blobs[0].Digest = "x" }},
		{"blob of a negative size", func(l *Layer) { chunked(l).Blobs[0].Size = -1 }},
		{"skeleton of pieces", func(l *Layer) { chunked(l); l.Skeleton = []byte("x") }},
		{"window before the start", func(l *Layer) { l.Access.Checkpoints[0].Window = []byte("x") }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := sampleLayer()
			tt.spoil(l)
			if _, err := EncodeLayer(l); !errdefs.IsInvalidArgument(err) {
				t.Errorf("%v", err)
			}
		})
	}
}

// What a hostile writer would put into the file is refused by the reader, too.
func TestDecodeLayerChecks(t *testing.T) {
	l := sampleLayer()
	l.Blob = digest.Digest("sha512:" + strings.Repeat("a", 128))
	if _, err := DecodeLayer(encodeLayer(t, l)); err != nil {
		t.Errorf("sha512: %v", err)
	}
	p, err := newPacker()
	if err != nil {
		t.Fatal(err)
	}
	spoil := map[string]func(*Layer){
		"entry":      func(l *Layer) { l.Entries[2].Path = "../x" },
		"entry size": func(l *Layer) { l.Entries[2].Size = 1 << 40 },
		"checkpoint": func(l *Layer) { l.Access.Checkpoints[2].Bit = 8001 },
		"extent":     func(l *Layer) { l.Access.Extents[2].Len = l.Table.Size },
		"format":     func(l *Layer) { l.Access.Format = 9 },
	}
	for name, f := range spoil {
		l := sampleLayer()
		f(l)
		b := appendHeader(nil, magicLayer, layerVersion, 0)
		b = p.section(b, appendLayerMeta(nil, l))
		b = p.section(b, EncodeTable(&l.Table))
		b = p.section(b, appendEntries(nil, l.Entries))
		b = p.section(b, appendExtents(nil, l.Access.Extents))
		b = p.section(b, appendCheckpoints(nil, l.Access.Checkpoints))
		b = p.section(b, appendPieces(nil, nil))
		b = p.section(b, appendSpans(nil, nil))
		b = p.section(b, appendRanges(nil, nil))
		b = p.section(b, nil)
		if _, err := DecodeLayer(b); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
