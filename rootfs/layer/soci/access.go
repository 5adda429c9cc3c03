package soci

import (
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strings"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Checkpoints of a gzip blob, little-endian: number of points (32 bits), plain
// bytes between two of them (64); then of each point the offset in the blob (64),
// the plain offset (64), bits (8), and a window. The first version leaves out
// the first point, behind a gzip header of the usual 10 bytes (gzip_zinfo.c).
const (
	pointsHeader = 4 + 8
	pointSize    = 8 + 8 + 1 + index.MaxWindow
	gzipHeader   = 10
)

// Fields of the table TarZinfo, the checkpoints of a blob that is plain tar.
const (
	tarSpanSize = 1
	tarSize     = 2
)

// access reads what a CompressionInfo says about how to read the blob.
func (p *parser) access(info table) error {
	spans := p.spans
	switch algorithm := info.byte(infoAlgorithm, algorithmGzip); algorithm {
	case algorithmGzip:
		p.layer.Access.Format = index.Gzip
		if p.size/maxDeflate > p.layer.BlobSize {
			return fmt.Errorf("%d bytes cannot inflate to %d", p.layer.BlobSize, p.size)
		}
		if err := p.points(info.bytes(infoCheckpoints)); err != nil {
			return err
		}
	case algorithmUnpacked:
		p.layer.Access.Format = index.Tar
		if p.size > p.layer.BlobSize {
			return fmt.Errorf("plain tar of %d bytes in a blob of %d", p.size, p.layer.BlobSize)
		}
		spans = p.tarSpans
	default:
		return fmt.Errorf("compression algorithm %d is not supported", algorithm)
	}
	if p.size < 0 {
		return fmt.Errorf("uncompressed size of %d bytes", p.size)
	}
	if err := spans(info); err != nil {
		return err
	}
	return p.digests(info)
}

// points reads the checkpoints of a gzip blob.
func (p *parser) points(b []byte) error {
	if len(b) < pointsHeader {
		return errors.New("no checkpoints")
	}
	n := int64(int32(binary.LittleEndian.Uint32(b)))
	body := b[pointsHeader:]
	points := make([]index.Checkpoint, 0, len(body)/pointSize+1)
	switch int64(len(body)) {
	case n * pointSize:
	case (n - 1) * pointSize:
		points = append(points, index.Checkpoint{Bit: gzipHeader * 8})
	default:
		return fmt.Errorf("%d checkpoints in %d bytes", n, len(b))
	}
	for ; len(body) > 0; body = body[pointSize:] {
		c, err := p.point(body[:pointSize:pointSize])
		if err != nil {
			return fmt.Errorf("checkpoint %d: %w", len(points), err)
		}
		points = append(points, c)
	}
	p.layer.Access.Checkpoints = points
	return p.checkPoints(points)
}

// point reads one checkpoint. Its block begins so many bits before the offset
// in the blob. Of the window, which always has 32 KiB, only the end counts near
// the start of the stream.
func (p *parser) point(b []byte) (index.Checkpoint, error) {
	in, out := binary.LittleEndian.Uint64(b), binary.LittleEndian.Uint64(b[8:])
	bits, window := b[16], b[17:]
	switch {
	case in < 1 || in > uint64(p.layer.BlobSize) || bits > 7:
		return index.Checkpoint{}, fmt.Errorf("%d bits before byte %d of a blob of %d", bits, in, p.layer.BlobSize)
	case out/maxDeflate > in:
		return index.Checkpoint{}, fmt.Errorf("%d bytes cannot inflate to %d", in, out)
	}
	window = window[len(window)-int(min(out, index.MaxWindow)):]
	return index.Checkpoint{Bit: int64(in)*8 - int64(bits), Out: int64(out), Window: window}, nil
}

// checkPoints checks that checkpoints are in order, close to each other, and
// lead to every byte.
func (p *parser) checkPoints(points []index.Checkpoint) error {
	if len(points) == 0 || points[0].Out != 0 {
		return errors.New("no checkpoint at the start of the stream")
	}
	last := points[0]
	for i, c := range points[1:] {
		if c.Bit <= last.Bit || c.Out < last.Out || c.Out-last.Out > maxPlain {
			return fmt.Errorf("checkpoint %d at plain byte %d, bit %d of the blob, is out of order or more than %d bytes behind the one before",
				i+1, c.Out, c.Bit, int64(maxPlain))
		}
		last = c
	}
	if p.size-last.Out > maxPlain {
		return fmt.Errorf("%d bytes behind the last checkpoint", p.size-last.Out)
	}
	return nil
}

// spans places the spans of a gzip blob: from the byte that has a checkpoint's
// first bit, to behind the byte that has the last bit before the next one.
// That byte can be in both.
func (p *parser) spans(table) error {
	points := p.layer.Access.Checkpoints
	spans := make([]index.Span, len(points))
	for i, c := range points {
		off, end := c.Bit/8, p.layer.BlobSize
		if i+1 < len(points) {
			end = (points[i+1].Bit + 7) / 8
		}
		spans[i] = index.Span{Off: off, Len: end - off}
	}
	p.layer.Access.Spans = spans
	return nil
}

// tarSpans places the spans of a plain tar, which all have the same length
// but for the last.
func (p *parser) tarSpans(info table) error {
	inner := newBuffer(info.bytes(infoCheckpoints))
	tar := inner.root()
	span, size := tar.long(tarSpanSize), tar.long(tarSize)
	if inner.err != nil {
		return fmt.Errorf("spans: %w", inner.err)
	}
	if span < 1 || size < 1 || size != p.layer.BlobSize {
		return fmt.Errorf("spans of %d bytes in a tar of %d, the layer has %d", span, size, p.layer.BlobSize)
	}
	_, n := info.vector(infoSpanDigests, 4)
	if int64(n) != (size-1)/span+1 {
		return fmt.Errorf("%d digests for %d bytes in spans of %d", n, size, span)
	}
	spans := make([]index.Span, n)
	for i := range spans {
		off := int64(i) * span
		spans[i] = index.Span{Off: off, Len: min(span, size-off)}
	}
	p.layer.Access.Spans = spans
	return nil
}

// digests reads the digests of the spans that are placed.
func (p *parser) digests(info table) error {
	spans := p.layer.Access.Spans
	_, n := info.vector(infoSpanDigests, 4)
	if last := int64(info.int(infoMaxSpan)); n != len(spans) || int64(n) != last+1 {
		return fmt.Errorf("%d digests for %d spans, the last of which has number %d", n, len(spans), last)
	}
	for i, s := range spans {
		if s.Len > maxSpan {
			return fmt.Errorf("span %d has %d bytes of the blob, over %d; make the index with a smaller --span-size", i, s.Len, int64(maxSpan))
		}
	}
	i := 0
	return info.each(infoSpanDigests, func(at int64) (err error) {
		if spans[i].Sum, err = parseSum(p.buf.text(at)); err != nil {
			return fmt.Errorf("span %d: %w", i, err)
		}
		i++
		return nil
	})
}

// parseSum reads "sha256:" and 64 hexadecimal digits.
func parseSum(s string) (index.Sum, error) {
	var sum index.Sum
	digits, ok := strings.CutPrefix(s, "sha256:")
	if !ok || len(digits) != hex.EncodedLen(len(sum)) {
		return sum, fmt.Errorf("digest %.80q is not SHA-256", s)
	}
	_, err := hex.Decode(sum[:], []byte(digits))
	return sum, err
}
