package zstdchunked

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/layer/toc"
)

// stargz's footer is the content of a frame that decoders skip: offset, length,
// plain length and type of the TOC, then a magic; each 8 bytes, little endian.
// podman's is longer, has another magic, and is never needed.
const (
	footerSize  = 40
	magic       = "GnUlInUx"
	frameHeader = 8 // magic and length of such a frame, bytes
)

// findTOC asks the blob where its TOC is.
func findTOC(ctx context.Context, b layer.Blob, desc layer.Descriptor) (position, error) {
	if desc.Size < footerSize {
		return position{}, toc.Invalid(errors.New("no zstd:chunked footer"))
	}
	footer, err := layer.ReadRange(ctx, b, desc.Size-footerSize, footerSize)
	if err != nil {
		return position{}, err
	}
	p, err := parseFooter(footer)
	if err != nil {
		return p, toc.Invalid(fmt.Errorf("footer: %w", err))
	}
	return p, nil
}

func parseFooter(b []byte) (position, error) {
	if len(b) != footerSize || string(b[32:]) != magic {
		return position{}, errors.New("no zstd:chunked footer of stargz")
	}
	var v [4]int64
	for i := range v {
		n := binary.LittleEndian.Uint64(b[8*i:])
		if v[i] = int64(n); v[i] < 0 {
			return position{}, fmt.Errorf("number %d is out of range", n)
		}
	}
	return newPosition(v)
}
