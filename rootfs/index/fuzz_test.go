package index

import (
	"bytes"
	"reflect"
	"testing"
)

// Whatever is accepted has exactly one encoding.
func FuzzDecodeTable(f *testing.F) {
	table := sampleTable()
	f.Add(EncodeTable(&table))
	f.Add(EncodeTable(&Table{}))
	f.Fuzz(func(t *testing.T, b []byte) {
		table, err := DecodeTable(b)
		if err != nil {
			return
		}
		if again := EncodeTable(table); !bytes.Equal(again, b) {
			t.Errorf("accepted %x, which is written as %x", b, again)
		}
	})
}

func FuzzDecodeLayer(f *testing.F) {
	f.Add(encodeLayer(f, sampleLayer()))
	f.Add(encodeLayer(f, &Layer{Blob: sampleLayer().Blob, Access: Access{Format: Tar}}))
	f.Fuzz(func(t *testing.T, b []byte) {
		l, err := DecodeLayer(b)
		if err != nil {
			return
		}
		again, err := EncodeLayer(l)
		if err != nil {
			t.Fatalf("accepted, but %v", err)
		}
		back, err := DecodeLayer(again)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(normal(l), normal(back)) {
			t.Errorf("%+v became %+v", l, back)
		}
	})
}

// FuzzReadEntries goes below the compression, which hides most of a layer from
// a fuzzer that changes bits.
func FuzzReadEntries(f *testing.F) {
	f.Add(appendEntries(nil, sampleEntries()), int64(1<<20))
	f.Fuzz(func(t *testing.T, b []byte, segment int64) {
		entries, err := readEntries(b, segment)
		if err != nil {
			return
		}
		again, err := readEntries(appendEntries(nil, entries), segment)
		if err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(entries, again) {
			t.Errorf("%+v became %+v", entries, again)
		}
	})
}

func FuzzReadAccess(f *testing.F) {
	a := sampleLayer().Access
	a.Checkpoints = a.Checkpoints[2:] // a short window: the fuzzer is slow on long input
	pieces := chunked(sampleLayer()).Pieces
	f.Add(appendExtents(nil, a.Extents), appendCheckpoints(nil, a.Checkpoints), appendPieces(nil, pieces), appendSpans(nil, []Span{{0, 9, Sum{1}}, {8, 2, Sum{2}}}))
	f.Fuzz(func(t *testing.T, extents, points, pieces, spans []byte) {
		var a, b Access
		if a.readExtents(extents) != nil || a.readCheckpoints(points) != nil || a.readPieces(pieces, len(pieces)) != nil || a.readSpans(spans) != nil {
			return
		}
		if err := b.readSpans(appendSpans(nil, a.Spans)); err != nil {
			t.Error(err)
		}
		if err := b.readExtents(appendExtents(nil, a.Extents)); err != nil {
			t.Error(err)
		}
		if err := b.readCheckpoints(appendCheckpoints(nil, a.Checkpoints)); err != nil {
			t.Error(err)
		}
		if err := b.readPieces(appendPieces(nil, a.Pieces), len(a.Pieces)); err != nil {
			t.Error(err)
		}
		if !reflect.DeepEqual(a, b) {
			t.Errorf("%+v became %+v", a, b)
		}
	})
}

func FuzzDecodeImage(f *testing.F) {
	b, err := EncodeImage(sampleImage())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b)
	f.Fuzz(func(t *testing.T, b []byte) {
		i, err := DecodeImage(b)
		if err != nil {
			return
		}
		if err := i.Validate(); err != nil {
			t.Fatalf("accepted, but %v", err)
		}
		if _, err := EncodeImage(i); err != nil {
			t.Error(err)
		}
	})
}
