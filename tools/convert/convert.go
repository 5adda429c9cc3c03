package convert

import (
	"context"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// Layer reads a plain tar and writes the blob that it is converted to. With a
// profile, tar must also be an io.ReaderAt with the same bytes from offset 0 on.
//
// The blob is a function of the tar and of the options but for Workers. All that
// Layer started has ended when it returns; for that it may have to wait for a
// Read of tar or a Write to w. On error what was written is of no use.
//
// Errors: ErrInvalidArgument, with the name of the entry, for a tar that is not
// valid or that the format cannot hold, and for options; those of tar, w and ctx
// as they are.
func Layer(ctx context.Context, tar io.Reader, w io.Writer, opts Options) (*Result, error) {
	res, err := convert(ctx, tar, w, opts)
	if err != nil {
		return nil, fmt.Errorf("convert layer: %w", err)
	}
	return res, nil
}

func convert(ctx context.Context, tar io.Reader, w io.Writer, opts Options) (*Result, error) {
	opts, err := opts.complete()
	if err != nil {
		return nil, err
	}
	p := &packer{opts: opts, entries: []*tocEntry{}, cut: cutter{size: opts.ChunkSize, content: opts.Format == ZstdChunked}}
	var missing []string
	moved := false
	if len(opts.Profile) > 0 {
		if tar, moved, missing, err = reorder(ctx, tar, opts.Profile); err != nil {
			return nil, err
		}
	}
	if !moved && opts.Format.landmarks() {
		p.mark = noPrefetchMark
	}
	out, err := newOutput(w, opts)
	if err != nil {
		return nil, err
	}
	if err := p.pass(ctx, tar, out); err != nil {
		return nil, err
	}
	res, err := out.finish(p)
	if err != nil {
		return nil, err
	}
	res.Missing = missing
	return res, nil
}

// pass runs the stages of the conversion over the tar.
func (p *packer) pass(ctx context.Context, tar io.Reader, out *output) error {
	p.line = newLine(p.opts.Workers)
	codecs := make([]codec, p.opts.Workers)
	for i := range codecs {
		var err error
		if codecs[i], err = newCodec(p.opts); err != nil {
			return err
		}
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return p.run(ctx, tar) })
	for _, c := range codecs {
		g.Go(func() error { return p.line.compress(ctx, c, p.opts.Format == ZstdChunked) })
	}
	g.Go(func() error { return out.run(ctx, p.line) })
	return g.Wait()
}

// finish writes TOC and footer.
func (o *output) finish(p *packer) (*Result, error) {
	t := &toc{Version: 1, Entries: p.entries}
	var res Result
	var err error
	switch o.opts.Format {
	case EStargz:
		err = o.finishEStargz(t, &res)
	case ZstdChunked:
		err = o.finishChunked(t, &res, p.split.bad)
	default:
		err = o.finishStargz(t, &res)
	}
	if err != nil {
		return nil, err
	}
	res.Descriptor.Digest = digest.NewDigest(digest.SHA256, o.blob)
	res.Descriptor.Size = o.size
	res.DiffID = digest.NewDigest(digest.SHA256, o.plain)
	res.PlainSize = o.plainSize
	return &res, nil
}

// errTOC is for layers of too many files.
func errTOC(size int) error {
	return fmt.Errorf("TOC of %d bytes, which no reader takes; leave the layer as it is: %w", size, errdefs.ErrInvalidArgument)
}
