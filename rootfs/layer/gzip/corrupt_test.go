package gzip

import (
	"bytes"
	stdgzip "compress/gzip"
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"io"
	"math/bits"
	"strings"
	"testing"
)

// bitWriter builds DEFLATE streams by hand.
type bitWriter struct {
	b []byte
	n uint
}

// put appends the low n bits of v, the least significant first.
func (w *bitWriter) put(v uint32, n uint) {
	for i := range n {
		if w.n%8 == 0 {
			w.b = append(w.b, 0)
		}
		w.b[len(w.b)-1] |= byte(v>>i&1) << (w.n % 8)
		w.n++
	}
}

// code appends an n-bit Huffman code, the most significant bit first.
func (w *bitWriter) code(v uint32, n uint) {
	w.put(bits.Reverse32(v)>>(32-n), n)
}

// member wraps a DEFLATE stream that stands for plain.
func member(deflate []byte, plain string) []byte {
	b := append([]byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0, 0, 255}, deflate...)
	b = binary.LittleEndian.AppendUint32(b, crc32.ChecksumIEEE([]byte(plain)))
	return binary.LittleEndian.AppendUint32(b, uint32(len(plain)))
}

// dynamic starts a last block with the given code lengths, each written as it
// is with 4-bit codes.
func dynamic(literals, dists []uint8) *bitWriter {
	w := new(bitWriter)
	w.put(1, 1)
	w.put(2, 2)
	w.put(uint32(len(literals)-257), 5)
	w.put(uint32(len(dists)-1), 5)
	w.put(15, 4)
	for _, sym := range codeOrder { // 0 to 15 have 4 bits
		if sym < 16 {
			w.put(4, 3)
		} else {
			w.put(0, 3)
		}
	}
	for _, n := range append(append([]uint8{}, literals...), dists...) {
		w.code(uint32(n), 4)
	}
	return w
}

// lengths makes a list of n code lengths that are 0 but for those given.
func lengths(n int, set map[int]uint8) []uint8 {
	l := make([]uint8, n)
	for i, v := range set {
		l[i] = v
	}
	return l
}

// torture are hand-made streams around what a decoder may get wrong. What is
// right about each is asked of compress/gzip.
func torture() map[string][]byte {
	m := map[string][]byte{}
	framing(m)
	fixedCodes(m)
	dynamicCodes(m)
	return m
}

// framing adds what is around DEFLATE data.
func framing(m map[string][]byte) {
	abc := compressString("abcabcabcabcabc")
	m["empty"] = nil
	m["valid"] = abc
	m["trailing garbage"] = append(bytes.Clone(abc), "garbage"...)
	m["trailing zeros"] = append(bytes.Clone(abc), make([]byte, 512)...)
	m["trailing zero"] = append(bytes.Clone(abc), 0)
	m["trailing half header"] = append(bytes.Clone(abc), 0x1f, 0x8b, 8)
	m["wrong crc"] = flip(abc, len(abc)-8)
	m["wrong size"] = flip(abc, len(abc)-1)
	m["wrong magic"] = flip(abc, 0)
	m["wrong method"] = flip(abc, 2)
	m["reserved flags"] = flip(abc, 3, 0xe0)
	m["empty member"] = append(compressString(""), abc...)
	m["header crc"] = headerWithCRC(abc, 0)
	m["wrong header crc"] = headerWithCRC(abc, 1)
	for _, n := range []int{510, 511, 512, 600} {
		m[fmt.Sprintf("name of %d bytes", n)] = headerWithName(abc, n)
	}
	m["stored"] = member([]byte{1, 1, 0, 0xfe, 0xff, 'x'}, "x")
	m["stored, wrong complement"] = member([]byte{1, 1, 0, 1, 0, 'x'}, "x")
	m["stored, empty"] = member([]byte{1, 0, 0, 0xff, 0xff}, "")
	m["block type 3"] = member([]byte{7, 1, 0, 0xfe, 0xff, 'x'}, "x")
}

// fixedCodes adds blocks with the fixed codes.
func fixedCodes(m map[string][]byte) {
	match := func(dist uint32) []byte { // 'a', a match of 3 bytes, the end
		w := new(bitWriter)
		w.put(3, 3)
		w.code(0x30+'a', 8)
		w.code(1, 7)
		w.code(dist, 5)
		w.code(0, 7)
		return w.b
	}
	m["match"] = member(match(0), "aaaa")
	m["match before the start"] = member(match(1), "aaaa")
	m["distance symbol 30"] = member(match(30), "aaaa")
	// A decoder that does not notice would copy the c of the member before.
	abc := compressString("abcabcabcabcabc")
	m["match into the member before"] = append(bytes.Clone(abc), member(match(1), "acac")...)

	// The same with many bytes to come, which decoders do in another way.
	w := new(bitWriter)
	w.put(2, 3)
	for range 5 {
		w.code(0x30+'a', 8)
	}
	w.code(1, 7)
	w.code(5, 5) // distance 7
	w.put(0, 1)
	w.code(0, 7)
	w.put(1, 3)
	x := strings.Repeat("x", 40)
	m["match into the member before, early"] = append(bytes.Clone(abc),
		member(append(append(w.b, 40, 0, 0xd7, 0xff), x...), "aaaaabca"+x)...)

	w = new(bitWriter)
	w.put(3, 3)
	w.code(0xc0+286-280, 8)
	w.code(0, 7)
	m["length symbol 286"] = member(w.b, "")
}

// dynamicCodes adds blocks that bring codes of all kinds. What follows the
// codes is what a decoder that accepts them would take for valid.
func dynamicCodes(m map[string][]byte) {
	type c struct{ v, n uint32 }
	block := func(literals, dists []uint8, plain string, codes ...c) []byte {
		w := dynamic(literals, dists)
		for _, c := range codes {
			w.code(c.v, uint(c.n))
		}
		return member(w.b, plain)
	}
	four := func(n int) []uint8 { return lengths(n, map[int]uint8{'a': 2, 'b': 2, 256: 2, 257: 2}) }
	a, end, match := c{0, 2}, c{2, 2}, c{3, 2}
	m["single distance code"] = block(four(258), []uint8{1}, "aaaa", a, match, c{0, 1}, end)
	m["unused half of a single code"] = block(four(258), []uint8{1}, "aaaa", a, match, c{1, 1}, end)
	m["single code of two bits"] = block(four(258), []uint8{2}, "a", a, end)
	m["no distance code"] = block(four(258), []uint8{0}, "a", a, end)
	m["no distance code but used"] = block(four(258), []uint8{0}, "aaaa", a, match, end)
	m["287 literals"] = block(four(287), []uint8{1}, "a", a, end)
	m["30 distances"] = block(four(258), lengths(30, map[int]uint8{0: 1}), "a", a, end)
	m["31 distances"] = block(four(258), lengths(31, map[int]uint8{0: 1}), "a", a, end)
	m["oversubscribed distances"] = block(four(258), []uint8{1, 1, 1}, "a", a, end)
	m["incomplete distances"] = block(four(258), []uint8{2, 2, 2}, "a", a, end)
	m["only the end"] = block(lengths(257, map[int]uint8{256: 1}), []uint8{0}, "", c{0, 1})
	m["no end"] = block(lengths(257, map[int]uint8{'a': 1, 'b': 1}), []uint8{0}, "a", c{0, 1})
	m["no codes"] = block(lengths(257, nil), []uint8{0}, "")
	m["incomplete"] = block(lengths(257, map[int]uint8{'a': 2, 'b': 2, 256: 2}), []uint8{1}, "a", a, end)
	m["oversubscribed"] = block(lengths(257, map[int]uint8{'a': 1, 'b': 1, 256: 1}), []uint8{1}, "a", c{0, 1}, c{2, 2})

	// The longest codes: 1, 2, 3 … 15, 15 bits.
	deep := map[int]uint8{256: 15}
	var codes []c
	for i := range uint32(15) {
		deep['a'+int(i)] = uint8(i + 1)
		codes = append(codes, c{1<<(i+1) - 2, i + 1})
	}
	m["deep codes"] = block(lengths(257, deep), []uint8{0}, "abcdefghijklmno", append(codes, c{1<<15 - 1, 15})...)
}

func compressString(s string) []byte {
	var b bytes.Buffer
	w := stdgzip.NewWriter(&b)
	_, _ = w.Write([]byte(s)) // a bytes.Buffer takes everything
	_ = w.Close()
	return b.Bytes()
}

func flip(b []byte, i int, mask ...byte) []byte {
	b = bytes.Clone(b)
	if len(mask) == 0 {
		mask = []byte{0x10}
	}
	b[i] ^= mask[0]
	return b
}

func headerWithCRC(gz []byte, wrong uint16) []byte {
	h := bytes.Clone(gz[:10])
	h[3] |= headerCRC
	h = binary.LittleEndian.AppendUint16(h, uint16(crc32.ChecksumIEEE(h))^wrong)
	return append(h, gz[10:]...)
}

func headerWithName(gz []byte, n int) []byte {
	h := bytes.Clone(gz[:10])
	h[3] |= headerName
	h = append(h, bytes.Repeat([]byte{'n'}, n)...)
	return append(append(h, 0), gz[10:]...)
}

// sameAsStandard fails unless this package and compress/gzip agree on gz.
func sameAsStandard(t *testing.T, gz []byte) {
	t.Helper()
	var want []byte
	r, wantErr := stdgzip.NewReader(bytes.NewReader(gz))
	if wantErr == nil {
		want, wantErr = io.ReadAll(r)
	}
	own := new(Pool).NewReader(bytes.NewReader(gz))
	own.Record(1)
	got, err := io.ReadAll(own)
	if (err == nil) != (wantErr == nil) {
		t.Fatalf("error %v, compress/gzip says %v", err, wantErr)
	}
	if err != nil {
		return
	}
	if !bytes.Equal(got, want) {
		t.Fatalf("other bytes than compress/gzip: %d and %d", len(got), len(want))
	}
	points := own.Checkpoints()
	for _, c := range points[:min(len(points), 20)] {
		rest, err := io.ReadAll(new(Pool).Resume(bytes.NewReader(gz[c.Bit/8:]), c))
		if err != nil || !bytes.Equal(rest, want[c.Out:]) {
			t.Fatalf("from bit %d, byte %d: %d bytes, %v", c.Bit, c.Out, len(rest), err)
		}
	}
}

func TestTorture(t *testing.T) {
	for name, gz := range torture() {
		t.Run(name, func(t *testing.T) { sameAsStandard(t, gz) })
	}
}

// TestCorrupt changes every byte of a stream in turn.
func TestCorrupt(t *testing.T) {
	gz := compress(t, mixed(2000), 9)
	for i := range gz {
		sameAsStandard(t, flip(gz, i, 1<<(i%8)))
	}
}

func FuzzInflate(f *testing.F) {
	for _, gz := range torture() {
		f.Add(gz)
	}
	for level := stdgzip.HuffmanOnly; level <= stdgzip.BestCompression; level += 3 {
		f.Add(compress(f, mixed(2000), level))
	}
	f.Fuzz(func(t *testing.T, gz []byte) {
		if len(gz) > 1<<20 {
			return
		}
		sameAsStandard(t, gz)
	})
}
