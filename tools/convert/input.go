package convert

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
)

const blockSize = 512

// maxHeader bounds an entry's header with what extends it, bytes. archive/tar
// takes up to 1 MiB for each extension, and any number of them.
const maxHeader = 8 << 20

// input reads a tar and keeps the bytes of its headers as they are.
type input struct {
	tar *tar.Reader
	rec recorder

	pad     int64 // behind the data of the current entry, bytes
	before  int   // of raw, the padding of the entry before
	dropped bool  // the current entry, and so its padding
}

// recorder is the stream below a tar reader. It keeps what is read from it
// while an entry's header is looked for: archive/tar reads no further than that.
type recorder struct {
	ctx  context.Context
	src  io.Reader
	on   bool
	kept []byte
}

func (r *recorder) Read(p []byte) (int, error) {
	if r.ctx.Err() != nil {
		return 0, context.Cause(r.ctx)
	}
	n, err := r.src.Read(p)
	if r.on {
		r.kept = append(r.kept, p[:n]...)
	}
	if r.on && len(r.kept) > maxHeader {
		return n, fmt.Errorf("header above %d bytes: %w", maxHeader, errdefs.ErrInvalidArgument)
	}
	return n, err
}

func newInput(ctx context.Context, r io.Reader) *input {
	in := &input{rec: recorder{ctx: ctx, src: r}}
	in.tar = tar.NewReader(&in.rec)
	return in
}

// next goes to the next entry, once the current one was read to its end. raw is
// all between its data and the next: padding (in.before), and the header with
// what extends it; at the end, with io.EOF, the end mark. It is valid until the
// next call.
func (in *input) next() (h *tar.Header, raw []byte, err error) {
	in.rec.on, in.rec.kept = true, in.rec.kept[:0]
	h, err = in.tar.Next()
	in.rec.on = false
	raw = in.rec.kept
	in.before = int(min(in.pad, int64(len(raw))))
	if in.dropped {
		raw, in.before, in.pad, in.dropped = raw[in.before:], 0, 0, false
	}
	if err != nil {
		return nil, raw, blameTar(err)
	}
	in.pad = -dataSize(h) & (blockSize - 1)
	return h, raw, checkData(h)
}

// drop leaves out the rest of the current entry.
func (in *input) drop() error {
	in.dropped = true
	_, err := io.Copy(io.Discard, in.tar)
	return blameTar(err)
}

// blameTar marks errors of archive/tar as the fault of the tar.
func blameTar(err error) error {
	if errors.Is(err, tar.ErrHeader) || errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, tar.ErrFieldTooLong) {
		return fmt.Errorf("read tar: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	return err
}

// dataSize is how many bytes of data follow a header.
func dataSize(h *tar.Header) int64 {
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeCont:
		return h.Size
	}
	return 0
}

// checkData refuses entries whose data cannot be copied as it is.
func checkData(h *tar.Header) error {
	if h.Typeflag == tar.TypeGNUSparse || sparse(h.PAXRecords) {
		return invalidEntry(h.Name, errors.New("sparse files have no place in these formats; make the layer without them"))
	}
	if h.Size < 0 || h.Size > index.MaxSegment {
		return invalidEntry(h.Name, fmt.Errorf("size of %d bytes", h.Size))
	}
	return nil
}

func sparse(records map[string]string) bool {
	for k := range records {
		if strings.HasPrefix(k, "GNU.sparse.") {
			return true
		}
	}
	return false
}

// invalidEntry is the error for an entry that cannot be converted.
func invalidEntry(name string, err error) error {
	return entryError(name, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument))
}
