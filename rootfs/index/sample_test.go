package index

import (
	"bytes"
	"crypto/sha256"
	"flag"
	"os"
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// golden returns the named file; with -update it first becomes got.
func golden(t *testing.T, name string, got []byte) []byte {
	t.Helper()
	path := filepath.Join("testdata", name)
	if *update {
		if err := os.WriteFile(path, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func sampleTable() Table {
	sum := func(s string) Sum { return sha256.Sum256([]byte(s)) }
	return Table{Size: 5 * UnitSize, Chunks: []Chunk{
		{Off: 0, Len: UnitSize, Sum: sum("a")},
		{Off: UnitSize, Len: 100, Sum: sum("b")},
		{Off: 3*UnitSize + 1, Len: 2*UnitSize - 1, Sum: sum("c")},
	}}
}

func sampleEntries() []Entry {
	return []Entry{
		{Path: "", Kind: Dir, Mode: 0o755, Sec: 1},
		{Path: "etc", Kind: Dir, Mode: 0o1777, UID: 1<<32 - 1, GID: 70000, Sec: -1 << 40, Nsec: 999999999},
		{Path: "etc/a", Kind: File, Mode: 0o4755, Sec: 1 << 40, Size: 4097, Off: 0},
		{Path: "etc/empty", Kind: File},
		{Path: "etc/b", Kind: File, Size: 1, Off: 2 * BlockSize, Xattrs: []Xattr{
			{"security.capability", "\x01\x00"}, {"user.empty", ""}, {"user.x", "value"},
		}},
		{Path: "etc/moved", Kind: File, Size: 10, Off: 16 * BlockSize},
		{Path: "link", Kind: Symlink, Link: "../..//odd\xff"},
		{Path: "hard", Kind: Hardlink, Link: "etc/a"},
		{Path: "dev/c", Kind: Char, Major: maxMajor, Minor: maxMinor},
		{Path: "dev/b", Kind: Block, Major: 8},
		{Path: "pipe\n\xfe", Kind: Fifo},
		{Path: "gone", Kind: Whiteout},
		{Path: "", Kind: Opaque},
	}
}

func sampleLayer() *Layer {
	return &Layer{
		Blob: digest.FromString("blob"), BlobSize: 1000, DiffID: digest.FromString("diff"),
		Entries: sampleEntries(),
		Table:   sampleTable(),
		Access: Access{
			Format:  Gzip,
			Extents: []Extent{{0, 512, 4097}, {8192, 6000, 1}, {16 * BlockSize, 100, 10}},
			Checkpoints: []Checkpoint{
				{Bit: 80},
				{Bit: 4001, Out: 40000, Window: bytes.Repeat([]byte("w"), MaxWindow)},
				{Bit: 7999, Out: 50000, Window: []byte("short")},
			},
		},
		Prefetch: []Range{{8192, 100}, {0, 4097}},
		Skeleton: []byte("headers of a tar"),
	}
}

// chunked makes l a layer of pieces, one of each kind.
func chunked(l *Layer) *Access {
	l.Skeleton = nil
	l.Access = Access{
		Format: Chunked,
		Blobs:  []BlobRef{{digest.FromString("other"), 5000}},
		Checkpoints: []Checkpoint{
			{Bit: 8003, Out: 70000, Window: []byte("window")},
			{Bit: 17, Out: 1},
		},
		Pieces: []Piece{
			{Off: 500, Len: 20, Codec: GzipMember},
			{Off: 0, Len: 500, Inner: 7, Codec: ZstdFrame},
			{Off: 1000, Len: 480, Inner: 3, Blob: 1, Codec: Deflate},
		},
	}
	return &l.Access
}

// vouched makes l a layer that is checked by spans of its blob.
func vouched(l *Layer, spans ...Span) {
	l.Table.Algorithm, l.Access.Spans = Vouched, spans
}

func sampleImage() *Image {
	a, b := sampleTable(), Table{Size: BlockSize}
	i := &Image{Manifest: digest.FromString("manifest"), Bootstrap: bytes.Repeat([]byte("boot"), 2*BlockSize/4)}
	off := int64(len(i.Bootstrap))
	for _, t := range []*Table{&a, &b} {
		i.Segments = append(i.Segments, Segment{ID: t.ID(), Layer: digest.FromString("layer"), Off: off, Table: t})
		off += t.Size
	}
	i.Segments[1].Prefetch = []Range{{4000, 96}, {0, 1}}
	return i
}
