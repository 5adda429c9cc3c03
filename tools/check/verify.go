package check

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"os"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/formats"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
)

// verify reads a whole segment by an index, checks every chunk, and compares
// its files with want unless that is nil.
func (c *checker) verify(ctx context.Context, w *Way, l formats.Layer, found *index.Layer, want *contents) error {
	w.Entries, w.Chunks = len(found.Entries), len(found.Table.Chunks)
	if err := found.Validate(); err != nil {
		return err
	}
	if err := l.Check(found); err != nil {
		w.problem("%v", err)
	}
	file, err := os.CreateTemp("", "tatami-check-")
	if err != nil {
		return fmt.Errorf("keep a segment (set TMPDIR to a directory with room): %w", err)
	}
	defer file.Close()
	if err := errors.Join(os.Remove(file.Name()), file.Truncate(found.Table.Size)); err != nil {
		return err
	}
	if err := c.fill(ctx, w, found, file); err != nil {
		return err
	}
	w.checkSkeleton(ctx, found, file)
	if want == nil {
		return nil
	}
	w.Compared = true
	return w.compare(ctx, found, file, want)
}

// fill reads the segment into file and checks every chunk.
func (c *checker) fill(ctx context.Context, w *Way, l *index.Layer, file *os.File) error {
	blobs := func(ref index.BlobRef) layer.Blob {
		return c.src.LayerBlob(ocispec.Descriptor{Digest: ref.Digest, Size: ref.Size})
	}
	body, err := layer.NewReader(l, blobs).Open(ctx, 0, l.Table.Size)
	if err != nil {
		return err
	}
	defer body.Close()
	job := c.progress.Start(w.From+" "+l.Blob.Encoded()[:12], l.Table.Size)
	defer job.Done("")
	at := int64(0)
	buf := make([]byte, index.MaxChunk)
	for _, chunk := range l.Table.Chunks {
		if _, err := io.CopyN(io.Discard, body, chunk.Off-at); err != nil {
			return fmt.Errorf("read the segment at %d: %w", at, err)
		}
		b := buf[:chunk.Len]
		if _, err := io.ReadFull(body, b); err != nil {
			return fmt.Errorf("read the chunk at %d: %w", chunk.Off, err)
		}
		// The sums of Vouched chunks are names; the reader has checked their spans.
		if a := l.Table.Algorithm; a != index.Vouched && a.Sum(b) != chunk.Sum {
			w.problem("chunk at %d, %d bytes, has not the digest that the index says", chunk.Off, chunk.Len)
		}
		if _, err := file.WriteAt(b, chunk.Off); err != nil {
			return fmt.Errorf("keep a segment (set TMPDIR to a directory with room): %w", err)
		}
		w.Bytes += chunk.Len
		job.Add(chunk.End() - at)
		at = chunk.End()
	}
	return nil
}

// checkSkeleton makes the tar again, if the index can.
func (w *Way) checkSkeleton(ctx context.Context, l *index.Layer, file *os.File) {
	if len(l.Skeleton) == 0 || l.DiffID == "" {
		return
	}
	got, err := layer.DiffID(ctx, l, file)
	switch {
	case err != nil:
		w.problem("make the tar again: %v", err)
	case got != l.DiffID:
		w.problem("skeleton and segment make a tar with diffID %s, not %s", got, l.DiffID)
	}
}

// sum is the digest of a file's content in a segment.
func sum(ctx context.Context, e *index.Entry, file *os.File) ([sha256.Size]byte, error) {
	var out [sha256.Size]byte
	if err := ctx.Err(); err != nil {
		return out, err
	}
	h := sha256.New()
	if _, err := io.Copy(h, io.NewSectionReader(file, e.Off, e.Size)); err != nil {
		return out, err
	}
	h.Sum(out[:0])
	return out, nil
}
