package layer

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"sort"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// spanned is a blob of which no byte is passed on before the whole span around
// it was read and compared with its digest.
type spanned struct {
	blob  Blob
	name  digest.Digest
	spans []index.Span
}

// Size implements Blob.
func (s *spanned) Size() int64 { return s.blob.Size() }

// ReadRange implements Blob; it asks for whole spans. Bytes that no span covers
// are ErrDataLoss.
func (s *spanned) ReadRange(ctx context.Context, off, n int64) (io.ReadCloser, error) {
	first := sort.Search(len(s.spans), func(i int) bool { return s.spans[i].End() > off })
	last := sort.Search(len(s.spans), func(i int) bool { return s.spans[i].End() >= off+n })
	if first == len(s.spans) || last == len(s.spans) {
		return nil, s.uncovered(s.spans[len(s.spans)-1].End())
	}
	start := s.spans[first].Off
	body, err := s.blob.ReadRange(ctx, start, s.spans[last].End()-start)
	if err != nil {
		return nil, err
	}
	return &spanReader{blob: s, body: body, i: first, pos: off, end: off + n}, nil
}

func (s *spanned) uncovered(off int64) error {
	return fmt.Errorf("index has no digest for byte %d of blob %s: %w", off, s.name, errdefs.ErrDataLoss)
}

// spanReader reads a range span by span.
type spanReader struct {
	blob *spanned
	body io.ReadCloser
	i    int          // next span
	span bytes.Buffer // the latest span, all of it
	rest []byte       // of span, checked and not passed on yet
	err  error        // sticky

	pos, end int64 // what is left
}

// Read implements io.Reader.
func (r *spanReader) Read(p []byte) (int, error) {
	if r.pos == r.end {
		return 0, io.EOF
	}
	if len(r.rest) == 0 && r.err == nil {
		r.err = r.next()
	}
	if r.err != nil {
		return 0, r.err
	}
	n := copy(p[:min(int64(len(p)), r.end-r.pos)], r.rest)
	r.rest = r.rest[n:]
	r.pos += int64(n)
	return n, nil
}

// next reads and checks the next span. The end of the one before may be its
// beginning.
func (r *spanReader) next() error {
	s := r.blob.spans[r.i]
	if s.Off > r.pos {
		return r.blob.uncovered(r.pos)
	}
	shared := 0
	if r.span.Len() > 0 {
		shared = int(r.blob.spans[r.i-1].End() - s.Off)
	}
	r.span.Next(r.span.Len() - shared)
	if _, err := io.CopyN(&r.span, r.body, s.Len-int64(shared)); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return fmt.Errorf("span %d of blob %s: %w", r.i, r.blob.name, err)
	}
	if sha256.Sum256(r.span.Bytes()) != s.Sum {
		return fmt.Errorf("span %d of blob %s, %d bytes at %d, has another digest than the index says: %w",
			r.i, r.blob.name, s.Len, s.Off, errdefs.ErrDataLoss)
	}
	r.rest = r.span.Bytes()[r.pos-s.Off:]
	r.i++
	return nil
}

// Close implements io.Closer.
func (r *spanReader) Close() error { return r.body.Close() }
