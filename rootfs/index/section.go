package index

import (
	"encoding/binary"
	"fmt"

	"github.com/klauspost/compress/zstd"
)

// A section is its plain and its stored length in bytes, 64 bits each, and the
// stored bytes: as they are when both lengths are equal, else one zstd frame.

// maxRatio bounds what a small input can make a reader allocate: a section
// that would shrink further is stored as it is. The first part is free, so that
// short sections of zeros need no thought.
const (
	maxRatio = 128
	freeSize = 64 << 10 // bytes
)

// packer compresses sections. It is made for one file and not kept.
type packer struct{ enc *zstd.Encoder }

func newPacker() (*packer, error) {
	// One goroutine, no frame checksum: the same bytes for the same input, and
	// content is checked by digests elsewhere.
	enc, err := zstd.NewWriter(nil, zstd.WithEncoderConcurrency(1), zstd.WithEncoderCRC(false))
	if err != nil {
		return nil, fmt.Errorf("set up zstd: %w", err)
	}
	return &packer{enc}, nil
}

// section appends plain to b.
func (p *packer) section(b, plain []byte) []byte {
	at := len(b)
	b = binary.LittleEndian.AppendUint64(b, uint64(len(plain)))
	b = binary.LittleEndian.AppendUint64(b, 0)
	body := len(b)
	b = p.enc.EncodeAll(plain, b)
	if n := len(b) - body; n >= len(plain) || tooSmall(n, len(plain)) {
		b = append(b[:body], plain...)
	}
	binary.LittleEndian.PutUint64(b[at+8:], uint64(len(b)-body))
	return b
}

func tooSmall(stored, plain int) bool {
	return uint64(plain) > freeSize+maxRatio*uint64(stored)
}

// unpacker reads sections.
type unpacker struct{ dec *zstd.Decoder }

func newUnpacker() (*unpacker, error) {
	dec, err := zstd.NewReader(nil, zstd.WithDecoderConcurrency(1), zstd.WithDecodeAllCapLimit(true))
	if err != nil {
		return nil, fmt.Errorf("set up zstd: %w", err)
	}
	return &unpacker{dec}, nil
}

func (u *unpacker) close() { u.dec.Close() }

// section takes the next section off r; its plain length may be at most limit
// bytes. The result may be part of r's memory. what names it in errors.
func (u *unpacker) section(r *reader, what string, limit int64) []byte {
	plain, stored := r.u64(), r.u64()
	body := r.take(stored)
	switch {
	case r.err != nil:
		r.err = fmt.Errorf("%s: %w", what, r.err)
		return nil
	case plain > uint64(limit):
		r.fail(fmt.Errorf("%s: %d bytes are over %d", what, plain, limit))
		return nil
	case plain == stored:
		return body
	case stored > plain || tooSmall(len(body), int(plain)):
		r.fail(fmt.Errorf("%s: %d bytes do not come from %d", what, plain, stored))
		return nil
	}
	out, err := u.dec.DecodeAll(body, make([]byte, 0, plain))
	if err == nil && uint64(len(out)) != plain {
		err = fmt.Errorf("%d bytes in place of %d", len(out), plain)
	}
	if err != nil {
		r.fail(fmt.Errorf("%s: decompress: %w", what, err))
		return nil
	}
	return out
}
