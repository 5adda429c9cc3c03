package convert

import (
	"bytes"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// codec compresses members. Each goroutine has one of its own.
type codec interface {
	// pack appends what p is compressed to. It depends on p alone.
	pack(dst, p []byte) ([]byte, error)
}

func newCodec(o Options) (codec, error) {
	if o.Format == EStargz {
		w, err := gzip.NewWriterLevel(nil, o.Level)
		return &gzipCodec{w}, err
	}
	w, err := zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(o.Level)), zstd.WithEncoderConcurrency(1))
	return zstdCodec{w}, err
}

type gzipCodec struct{ w *gzip.Writer }

func (c *gzipCodec) pack(dst, p []byte) ([]byte, error) {
	b := bytes.NewBuffer(dst)
	c.w.Reset(b)
	if _, err := c.w.Write(p); err != nil {
		return nil, err
	}
	err := c.w.Close()
	return b.Bytes(), err
}

type zstdCodec struct{ w *zstd.Encoder }

func (c zstdCodec) pack(dst, p []byte) ([]byte, error) { return c.w.EncodeAll(p, dst), nil }
