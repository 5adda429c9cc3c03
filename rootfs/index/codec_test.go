package index

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"math/rand/v2"
	"reflect"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// The encoding of a table is what segments are named by: it may never change.
func TestTableGolden(t *testing.T) {
	table := sampleTable()
	got := EncodeTable(&table)
	if want := golden(t, "table.golden", got); !bytes.Equal(got, want) {
		t.Errorf("encoding changed:\n%x\nwant\n%x", got, want)
	}
	if want := digest.Digest("sha256:" + tableSum); table.ID() != want {
		t.Errorf("ID %s, want %s", table.ID(), want)
	}
	back, err := DecodeTable(got)
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(*back, table) {
		t.Errorf("decoded %+v, want %+v", *back, table)
	}
}

// Files written by earlier versions must stay readable.
func TestLayerGolden(t *testing.T) {
	b := encodeLayer(t, sampleLayer())
	got, err := DecodeLayer(golden(t, "layer.golden", b))
	if err != nil {
		t.Fatal(err)
	}
	if want := sampleLayer(); !reflect.DeepEqual(normal(got), normal(want)) {
		t.Errorf("decoded\n%+v, want\n%+v", got, want)
	}
	if again := encodeLayer(t, sampleLayer()); !bytes.Equal(b, again) {
		t.Error("two encodings of one layer differ")
	}
}

func TestImageGolden(t *testing.T) {
	b, err := EncodeImage(sampleImage())
	if err != nil {
		t.Fatal(err)
	}
	got, err := DecodeImage(golden(t, "image.golden", b))
	if err != nil {
		t.Fatal(err)
	}
	if err := got.Validate(); err != nil {
		t.Error(err)
	}
	want := sampleImage()
	for i := range got.Segments {
		if !reflect.DeepEqual(got.Segments[i].Table.Size, want.Segments[i].Table.Size) {
			t.Errorf("table %d differs", i)
		}
	}
	if !bytes.Equal(got.Bootstrap, want.Bootstrap) || got.Manifest != want.Manifest || got.Size() != want.Size() {
		t.Errorf("decoded %d bytes of bootstrap, size %d", len(got.Bootstrap), got.Size())
	}
}

const tableSum = "3933d97d926daa9b35f14da50840cfa5ce49608b15b9709b6778e5485b0c4b21"

func encodeLayer(t testing.TB, l *Layer) []byte {
	t.Helper()
	b, err := EncodeLayer(l)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// normal makes nil and empty windows the same.
func normal(l *Layer) *Layer {
	for i := range l.Access.Checkpoints {
		if len(l.Access.Checkpoints[i].Window) == 0 {
			l.Access.Checkpoints[i].Window = nil
		}
	}
	return l
}

// Every format comes back as it was.
func TestLayerFormats(t *testing.T) {
	for name, change := range map[string]func(*Layer){
		"pieces": func(l *Layer) { l.DiffID, l.Table.Algorithm = "", BLAKE3; chunked(l) },
		"spans":  func(l *Layer) { vouched(l, Span{0, 501, Sum{1}}, Span{500, 500, Sum{2}}) },
		"frames": func(l *Layer) { l.Access.Format, l.Access.Checkpoints = Zstd, []Checkpoint{{}, {Bit: 800, Out: 5}} },
	} {
		t.Run(name, func(t *testing.T) {
			l := sampleLayer()
			change(l)
			got, err := DecodeLayer(encodeLayer(t, l))
			if err != nil {
				t.Fatal(err)
			}
			if !reflect.DeepEqual(normal(got), normal(l)) {
				t.Errorf("decoded\n%+v, want\n%+v", got, l)
			}
		})
	}
}

// The algorithm is part of what a segment is named by.
func TestTableAlgorithm(t *testing.T) {
	seen := map[ID]bool{}
	for a := SHA256; a <= Vouched; a++ {
		table := sampleTable()
		table.Algorithm = a
		back, err := DecodeTable(EncodeTable(&table))
		if err != nil || back.Algorithm != a {
			t.Errorf("algorithm %d came back as %+v, %v", a, back, err)
		}
		seen[table.ID()] = true
	}
	if len(seen) != 3 {
		t.Error("tables with different algorithms have the same ID")
	}
	sum := BLAKE3.Sum([]byte("abc"))
	if got := hex.EncodeToString(sum[:]); got != "6437b3ac38465133ffb63b75273a8db548c558465d79db03fd359c6cd5bd9d85" {
		t.Errorf("BLAKE3 of abc is %s", got)
	}
}

func TestTableRefuses(t *testing.T) {
	tests := []struct {
		name  string
		table Table
	}{
		{"size not whole blocks", Table{Size: 1}},
		{"negative size", Table{Size: -BlockSize}},
		{"size over the limit", Table{Size: MaxSegment + BlockSize}},
		{"unknown algorithm", Table{Algorithm: Vouched + 1}},
		{"empty chunk", Table{Size: BlockSize, Chunks: []Chunk{{}}}},
		{"chunk too long", Table{Size: 64 << 20, Chunks: []Chunk{{Len: MaxChunk + 1}}}},
		{"chunk behind the end", Table{Size: BlockSize, Chunks: []Chunk{{Off: 1, Len: BlockSize}}}},
		{"overlap", Table{Size: BlockSize, Chunks: []Chunk{{Off: 0, Len: 10}, {Off: 9, Len: 10}}}},
		{"wrong order", Table{Size: BlockSize, Chunks: []Chunk{{Off: 10, Len: 10}, {Off: 0, Len: 10}}}},
		{"offset that overflows", Table{Size: BlockSize, Chunks: []Chunk{{Off: 1<<63 - 10, Len: 20}}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := tt.table.Validate(); !errdefs.IsInvalidArgument(err) {
				t.Errorf("Validate: %v", err)
			}
			if _, err := DecodeTable(EncodeTable(&tt.table)); !errdefs.IsInvalidArgument(err) {
				t.Errorf("DecodeTable: %v", err)
			}
		})
	}
}

func TestHeaderRefuses(t *testing.T) {
	table := sampleTable()
	good := EncodeTable(&table)
	tests := []struct {
		name string
		make func([]byte) []byte
		want string
	}{
		{"empty", func([]byte) []byte { return nil }, "ends too early"},
		{"magic", func(b []byte) []byte { b[0] ^= 1; return b }, "magic"},
		{"version", func(b []byte) []byte { b[8] = 2; return b }, "version 2"},
		{"flags", func(b []byte) []byte { b[11] = 0x80; return b }, "flags 0x8000"},
		{"more", func(b []byte) []byte { return append(b, 0) }, "1 bytes too many"},
		{"less", func(b []byte) []byte { return b[:len(b)-1] }, "ends too early"},
		{"count", func(b []byte) []byte { b[22] = 1; return b }, "do not fit"},
		{"needless zero byte", func(b []byte) []byte {
			b[len(b)-1] |= 0x80
			return append(b, 0)
		}, "needless"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := DecodeTable(tt.make(bytes.Clone(good)))
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("%v, want %q", err, tt.want)
			}
		})
	}
}

// A flipped bit anywhere is refused or gives another, still sound, layer.
func TestLayerCorruption(t *testing.T) {
	b := encodeLayer(t, sampleLayer())
	rng := rand.New(rand.NewPCG(1, 2))
	for range 3000 {
		c := bytes.Clone(b)
		c[rng.IntN(len(c))] ^= 1 << rng.IntN(8)
		if l, err := DecodeLayer(c); err == nil {
			if err := l.Validate(); err != nil {
				t.Fatalf("accepted, but: %v", err)
			}
		}
	}
}

// A section must not make the reader allocate out of proportion.
func TestSectionBombs(t *testing.T) {
	p, err := newPacker()
	if err != nil {
		t.Fatal(err)
	}
	u, err := newUnpacker()
	if err != nil {
		t.Fatal(err)
	}
	defer u.close()
	zeros := make([]byte, 32<<20)
	b := p.section(nil, zeros)
	if len(b) < len(zeros) {
		t.Fatalf("32 MiB of zeros were stored in %d bytes", len(b))
	}
	r := reader{b: b}
	if got := u.section(&r, "zeros", 64<<20); !bytes.Equal(got, zeros) || r.end() != nil {
		t.Fatal(r.err)
	}

	frame := p.enc.EncodeAll(zeros, nil)
	claim := func(plain int) []byte {
		b := binary.LittleEndian.AppendUint64(nil, uint64(plain))
		b = binary.LittleEndian.AppendUint64(b, uint64(len(frame)))
		return append(b, frame...)
	}
	for name, plain := range map[string]int{"in proportion, frame is longer": 100 * len(frame), "out of proportion": len(zeros), "over the limit": 1 << 40} {
		r := reader{b: claim(plain)}
		if u.section(&r, name, 64<<20); r.err == nil {
			t.Errorf("%s: accepted", name)
		}
	}
}

func TestImageRefuses(t *testing.T) {
	tests := []struct {
		name  string
		spoil func(*Image)
	}{
		{"no manifest", func(i *Image) { i.Manifest = "" }},
		{"no bootstrap", func(i *Image) { i.Bootstrap = nil }},
		{"broken block", func(i *Image) { i.Bootstrap = i.Bootstrap[1:] }},
		{"gap", func(i *Image) { i.Segments[1].Off += BlockSize }},
		{"overlap", func(i *Image) { i.Segments[1].Off -= BlockSize }},
		{"foreign ID", func(i *Image) { i.Segments[0].ID = digest.FromString("x") }},
		{"twice", func(i *Image) {
			i.Segments[1] = i.Segments[0]
			i.Segments[1].Off = i.Segments[0].End()
		}},
		{"no table", func(i *Image) { i.Segments[0].Table = nil }},
		{"empty segment", func(i *Image) {
			i.Segments[1].Table = &Table{}
			i.Segments[1].ID = i.Segments[1].Table.ID()
		}},
		{"layer not a digest", func(i *Image) { i.Segments[0].Layer = "sha256:../../x" }},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			i := sampleImage()
			tt.spoil(i)
			if _, err := EncodeImage(i); !errdefs.IsInvalidArgument(err) {
				t.Errorf("EncodeImage: %v", err)
			}
			if err := i.Validate(); !errdefs.IsInvalidArgument(err) {
				t.Errorf("Validate: %v", err)
			}
		})
	}
	b, err := EncodeImage(sampleImage())
	if err != nil {
		t.Fatal(err)
	}
	b[len(b)-10] ^= 1 // in the last table's size: still a sound table, but another one
	if _, err := DecodeImage(b); !errdefs.IsInvalidArgument(err) {
		t.Errorf("DecodeImage of a changed table: %v", err)
	}
}
