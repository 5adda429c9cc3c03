package layer

import (
	"context"
	"errors"
	"io"
)

// ReadRange reads n bytes of a blob from offset off on.
func ReadRange(ctx context.Context, b Blob, off, n int64) ([]byte, error) {
	r, err := b.ReadRange(ctx, off, n)
	if err != nil {
		return nil, err
	}
	p := make([]byte, n)
	_, err = io.ReadFull(r, p)
	if closeErr := r.Close(); err == nil {
		err = closeErr
	}
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return p, err
}
