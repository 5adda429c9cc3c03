package convert

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"hash"
	"io"

	"github.com/opencontainers/go-digest"
)

// line is where members go round: free ones to the packer, filled ones to the
// workers, and in order to the writer. There is a fixed number of them, which
// bounds memory, and every channel has room for all, so that only taking waits.
type line struct {
	free, work, order chan *member
}

func newLine(workers int) *line {
	n := 2*workers + 1
	l := &line{make(chan *member, n), make(chan *member, n), make(chan *member, n)}
	for range n {
		l.free <- &member{done: make(chan struct{}, 1)}
	}
	return l
}

// get returns an empty member.
func (l *line) get(ctx context.Context) (*member, error) {
	select {
	case m := <-l.free:
		return m, nil
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// send hands on a filled member.
func (l *line) send(m *member) {
	if len(m.plain) > 0 {
		l.order <- m
		l.work <- m
	} else {
		l.free <- m
	}
}

// close says that no more members are sent.
func (l *line) close() {
	close(l.work)
	close(l.order)
}

// compress packs members until the line is closed.
func (l *line) compress(ctx context.Context, c codec, crc bool) error {
	for m := range l.work {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err := m.pack(c, crc); err != nil {
			return err
		}
		m.done <- struct{}{}
	}
	return nil
}

// output writes members in order and knows what the blob is so far.
type output struct {
	w         io.Writer
	opts      Options
	blob      hash.Hash
	size      int64 // of the blob, bytes
	plain     hash.Hash
	plainSize int64

	sum hash.Hash // of a file of several chunks, while it goes by

	split *tarSplit // ZstdChunked
}

func newOutput(w io.Writer, o Options) (*output, error) {
	out := &output{w: w, opts: o, blob: sha256.New(), plain: sha256.New(), sum: sha256.New()}
	var err error
	if o.Format == ZstdChunked {
		out.split, err = newTarSplit(o.Level)
	}
	return out, err
}

// run takes members from the line until it is closed.
func (o *output) run(ctx context.Context, l *line) error {
	for m := range l.order {
		select {
		case <-m.done:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if err := o.member(m); err != nil {
			return err
		}
		m.reset()
		l.free <- m
	}
	return nil
}

func (o *output) member(m *member) error {
	at := o.size
	if err := o.write(m.packed); err != nil {
		return err
	}
	o.addPlain(m.plain)
	off := 0
	for i := range m.parts {
		p := &m.parts[i]
		data := m.plain[off : off+p.n]
		off += p.n
		if p.kind == chunkPart {
			o.chunk(p, data, at)
		}
		if o.split != nil {
			if err := o.split.part(p, data); err != nil {
				return err
			}
		}
	}
	return nil
}

// write appends to the blob.
func (o *output) write(p []byte) error {
	n, err := o.w.Write(p)
	o.blob.Write(p[:n])
	o.size += int64(n)
	return err
}

// addPlain counts what the blob is decompressed to.
func (o *output) addPlain(p []byte) {
	o.plain.Write(p)
	o.plainSize += int64(len(p))
}

// chunk completes the TOC's entries for a chunk in the member at byte at.
func (o *output) chunk(p *part, data []byte, at int64) {
	f := p.file
	sum := "sha256:" + hex.EncodeToString(p.sum[:])
	p.entry.Offset = at
	if o.opts.Format != ZstdChunked || !p.whole() {
		p.entry.ChunkDigest = sum
	}
	if !p.whole() {
		if f.left == f.size {
			o.sum.Reset()
		}
		o.sum.Write(data)
		sum = digest.NewDigest(digest.SHA256, o.sum).String()
	}
	f.left -= int64(p.n)
	if f.left > 0 {
		return
	}
	f.entry.Digest = sum
	if o.opts.Format == ZstdChunked {
		f.entry.EndOffset = o.size
	}
}
