package store

import (
	"bytes"
	"encoding/binary"
	"hash/crc32"
	"reflect"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
)

func sampleBits() (bitmap, int) {
	b := newBitmap(130)
	for _, i := range []int{0, 1, 63, 64, 100, 129} {
		b.set(i)
	}
	return b, 130
}

func TestBits(t *testing.T) {
	b, n := sampleBits()
	got, err := decodeBits(encodeBits(b, n), n)
	if err != nil {
		t.Fatal(err)
	}
	for i := range n {
		if got.has(i) != b.has(i) {
			t.Errorf("bit %d is %v", i, got.has(i))
		}
	}
	if b.set(64) || !b.set(65) {
		t.Error("set does not tell whether it changed the bit")
	}
	if b.clear(65); b.has(65) || !b.has(64) {
		t.Error("clear")
	}
	good := encodeBits(b, n)
	for k := range good {
		bad := bytes.Clone(good)
		bad[k] ^= 4
		if _, err := decodeBits(bad, n); !errdefs.IsDataLoss(err) {
			t.Errorf("byte %d changed: %v", k, err)
		}
	}
	for _, other := range []int{0, 1, 129, 131, 200} {
		if _, err := decodeBits(encodeBits(b, n), other); !errdefs.IsDataLoss(err) {
			t.Errorf("bits of %d chunks taken for %d: %v", n, other, err)
		}
	}
}

func FuzzDecodeBits(f *testing.F) {
	b, n := sampleBits()
	good := encodeBits(b, n)
	f.Add(good, n)
	f.Add(good[:len(good)-1], n)
	f.Add(encodeBits(newBitmap(0), 0), 0)
	f.Add([]byte(bitsMagic), 1<<20)
	f.Fuzz(func(t *testing.T, data []byte, n int) {
		if n < 0 || n > 1<<20 {
			return
		}
		b, err := decodeBits(data, n)
		if err == nil && !bytes.Equal(encodeBits(b, n), data) {
			t.Error("decoded and encoded again it differs")
		}
	})
}

func sampleRecord() record {
	return record{
		Version: recordVersion, Manifest: digest.FromString("m"), Bootstrap: digest.FromString("b"), BootSize: 2 * index.BlockSize,
		Segments: []recordSegment{
			{ID: digest.FromString("1"), Layer: digest.FromString("l1"), Size: index.BlockSize},
			{
				ID: digest.FromString("2"), Layer: digest.FromString("l2"), Size: 5 * index.BlockSize,
				Prefetch: []index.Range{{Off: 4096, Len: 1}, {Off: 0, Len: 5 * index.BlockSize}},
			},
		},
	}
}

func TestRecord(t *testing.T) {
	r := sampleRecord()
	data, err := encodeRecord(&r)
	if err != nil {
		t.Fatal(err)
	}
	got, err := decodeRecord(data)
	if err != nil || !got.equal(&r) || !got.sameHints(&r) || got.size() != 8*index.BlockSize {
		t.Errorf("%+v, %v", got, err)
	}
	if off, ok := got.offset(r.Segments[1].ID); off != 3*index.BlockSize || !ok {
		t.Errorf("offset %d, %v", off, ok)
	}
	harm := map[string]func(r *record){
		"old version":     func(r *record) { r.Version = 1 },
		"new version":     func(r *record) { r.Version = 3 },
		"manifest":        func(r *record) { r.Manifest = "sha256:../../etc/passwd" },
		"bootstrap":       func(r *record) { r.Bootstrap = "" },
		"boot size":       func(r *record) { r.BootSize = -4096 },
		"odd boot size":   func(r *record) { r.BootSize = 5 },
		"segment size":    func(r *record) { r.Segments[0].Size = index.MaxSegment + 4096 },
		"segment id":      func(r *record) { r.Segments[0].ID = "x" },
		"segment layer":   func(r *record) { r.Segments[0].Layer = "x" },
		"segment twice":   func(r *record) { r.Segments[1] = r.Segments[0] },
		"hint behind":     func(r *record) { r.Segments[1].Prefetch[0].Off = 5 * index.BlockSize },
		"hint overflows":  func(r *record) { r.Segments[1].Prefetch[0] = index.Range{Off: 1 << 62, Len: 1 << 62} },
		"hint before":     func(r *record) { r.Segments[1].Prefetch[0].Off = -1 },
		"hint of nothing": func(r *record) { r.Segments[1].Prefetch[0].Len = 0 },
		"segment without": func(r *record) { r.Segments[1].Size = 0 },
	}
	for name, f := range harm {
		r := sampleRecord()
		f(&r)
		data, err := encodeRecord(&r)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeRecord(data); !errdefs.IsDataLoss(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzDecodeRecord(f *testing.F) {
	r := sampleRecord()
	data, err := encodeRecord(&r)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data)
	f.Add(data[:100])
	f.Add([]byte(`{"version":2,"extra":2}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		r, err := decodeRecord(data)
		if err != nil {
			return
		}
		if r.size() < r.BootSize || slices.ContainsFunc(r.Segments, func(g recordSegment) bool { return g.Size <= 0 }) {
			t.Errorf("accepted %+v", r)
		}
	})
}

func sampleLinks() *linkFile {
	return &linkFile{chunks: 130, targets: []linkTarget{
		{id: digest.FromString("1"), pairs: []linkPair{{chunk: 0, target: 7}, {chunk: 129, target: 1 << 31}}},
		{id: digest.FromString("2"), pairs: []linkPair{{chunk: 5, target: 5}}},
		{id: digest.FromString("3"), pairs: []linkPair{}},
	}}
}

func TestLinks(t *testing.T) {
	good, err := encodeLinks(sampleLinks())
	if err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{130, -1} {
		if got, err := decodeLinks(good, n); err != nil || !reflect.DeepEqual(got, sampleLinks()) {
			t.Errorf("%+v, %v", got, err)
		}
	}
	for _, n := range []int{0, 129, 131} {
		if _, err := decodeLinks(good, n); !errdefs.IsDataLoss(err) {
			t.Errorf("links of 130 chunks taken for %d: %v", n, err)
		}
	}
	for k := range good {
		bad := bytes.Clone(good)
		bad[k] ^= 4
		if _, err := decodeLinks(bad, -1); !errdefs.IsDataLoss(err) {
			t.Errorf("byte %d changed: %v", k, err)
		}
		if _, err := decodeLinks(good[:k], -1); !errdefs.IsDataLoss(err) {
			t.Errorf("cut at %d: %v", k, err)
		}
	}
	harm := map[string]func(f *linkFile){
		"chunk behind the end": func(f *linkFile) { f.targets[0].pairs[1].chunk = 130 },
		"out of order":         func(f *linkFile) { f.targets[0].pairs[1].chunk = 0 },
	}
	for name, h := range harm {
		f := sampleLinks()
		h(f)
		data, err := encodeLinks(f)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := decodeLinks(data, -1); !errdefs.IsDataLoss(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if _, err := encodeLinks(&linkFile{targets: []linkTarget{{id: "sha512:00"}}}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a foreign id: %v", err)
	}
}

func FuzzDecodeLinks(f *testing.F) {
	good, err := encodeLinks(sampleLinks())
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good[:len(good)-4], 130)
	f.Add(good[:len(good)-8], 130)
	f.Add(good[:linksHeader], -1)
	f.Fuzz(func(t *testing.T, body []byte, n int) {
		data := binary.LittleEndian.AppendUint32(body, crc32.Checksum(body, crc32.MakeTable(crc32.Castagnoli)))
		got, err := decodeLinks(data, n)
		if err != nil {
			return
		}
		if again, err := encodeLinks(got); err != nil || !bytes.Equal(again, data) {
			t.Errorf("decoded and encoded again it differs: %v", err)
		}
	})
}
