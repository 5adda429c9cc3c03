package convert

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer/tarball"
)

// maxTail bounds what follows the last chunk of a member, bytes: a layer may
// have any number of entries without data.
const maxTail = 1 << 20

// packer cuts a tar into members.
type packer struct {
	opts  Options
	mark  string // landmark to put before the tar, if any
	cut   cutter
	line  *line
	split splitCheck

	entries []*tocEntry
	m       *member // being filled
	chunks  int     // in m
	rest    []byte  // of a window, behind the chunk that was cut off
}

// run reads the whole tar.
func (p *packer) run(ctx context.Context, r io.Reader) (err error) {
	defer p.line.close()
	if p.m, err = p.line.get(ctx); err != nil {
		return err
	}
	if p.mark != "" {
		if err := p.landmark(ctx); err != nil {
			return err
		}
	}
	in := newInput(ctx, r)
	if err := p.all(ctx, in); err != nil {
		return err
	}
	p.line.send(p.m)
	return nil
}

// all takes in what comes from in. Marks that an earlier conversion left are
// dropped if a new one was made.
func (p *packer) all(ctx context.Context, in *input) error {
	for {
		h, raw, err := in.next()
		if errors.Is(err, io.EOF) {
			return p.end(ctx, in, raw)
		}
		if err != nil {
			return err
		}
		path, _ := tarball.Clean(h.Name) // newEntry complains
		if p.mark != "" && isMark(path) {
			p.put(part{kind: otherPart}, raw[:in.before])
			err = in.drop()
		} else {
			err = p.add(ctx, h, raw, in.tar)
		}
		if err != nil {
			return entryError(h.Name, err)
		}
	}
}

// entryError names the entry in an error.
func entryError(name string, err error) error {
	if len(name) > index.MaxName {
		name = name[:index.MaxName] + "…"
	}
	return fmt.Errorf("tar entry %q: %w", name, err)
}

// put adds bytes to the member.
func (p *packer) put(t part, b []byte) {
	t.n = len(b)
	if t.n > 0 {
		p.m.plain = append(p.m.plain, b...)
		p.m.parts = append(p.m.parts, t)
	}
}

// flush sends the member off and begins another.
func (p *packer) flush(ctx context.Context) (err error) {
	p.line.send(p.m)
	p.chunks = 0
	p.m, err = p.line.get(ctx)
	return err
}

// landmark adds the file that tells how far to prefetch: not at all.
func (p *packer) landmark(ctx context.Context) error {
	h, b, err := landmark(p.mark)
	if err != nil {
		return err
	}
	if err := p.add(ctx, h, b[:blockSize], strings.NewReader(markContent)); err != nil {
		return err
	}
	p.put(part{kind: otherPart}, b[blockSize+len(markContent):])
	return nil
}

// add takes in an entry, raw being its header with all that belongs to it.
func (p *packer) add(ctx context.Context, h *tar.Header, raw []byte, data io.Reader) error {
	if len(p.m.plain) > 0 && len(p.m.plain)+len(raw) > int(p.opts.ChunkSize)+maxTail {
		if err := p.flush(ctx); err != nil {
			return err
		}
	}
	p.split.see(h)
	if h.Typeflag == tar.TypeXGlobalHeader { // means nothing to runtimes
		p.put(part{kind: otherPart}, raw)
		return nil
	}
	e, err := newEntry(h)
	if err == nil && len(p.entries) >= index.MaxEntries {
		err = errors.New("too many entries in one layer")
	}
	if err != nil {
		return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
	}
	f := &file{entry: e, size: dataSize(h), left: dataSize(h)}
	p.put(part{kind: headerPart, file: f}, raw)
	p.entries = append(p.entries, e)
	if e.Type == typeReg && f.size == 0 && p.opts.Format != ZstdChunked {
		e.Digest = digest.FromBytes(nil).String()
	}
	return p.content(ctx, f, data)
}

// content takes in the data of a file, chunk by chunk.
func (p *packer) content(ctx context.Context, f *file, data io.Reader) error {
	p.rest = p.rest[:0]
	for off := int64(0); off < f.size; {
		n := min(f.size-off, p.opts.ChunkSize)
		if err := p.place(ctx, f, n); err != nil {
			return err
		}
		start := len(p.m.plain)
		window, err := p.window(n, data)
		if err != nil {
			return err
		}
		k, empty := p.cut.cut(window)
		p.rest = append(p.rest[:0], window[k:]...)
		p.m.plain = p.m.plain[:start+k]
		p.m.parts = append(p.m.parts, part{kind: chunkPart, n: k, file: f, entry: p.chunk(f, off, int64(k), start, empty)})
		p.chunks++
		off += int64(k)
	}
	return nil
}

// place makes sure that the next chunk may follow what the member has.
func (p *packer) place(ctx context.Context, f *file, n int64) error {
	have := int64(len(p.m.plain))
	packs := p.chunks > 0 && have+n <= p.opts.Pack && !isMark(f.entry.Name)
	if have == 0 || packs {
		return nil
	}
	return p.flush(ctx)
}

// window appends the next n bytes of a file to the member, and returns them.
func (p *packer) window(n int64, data io.Reader) ([]byte, error) {
	start := len(p.m.plain)
	p.m.plain = append(p.m.plain, p.rest...)
	have := len(p.m.plain)
	p.m.plain = append(p.m.plain, make([]byte, start+int(n)-have)...)
	if _, err := io.ReadFull(data, p.m.plain[have:]); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, blameTar(err)
	}
	return p.m.plain[start:], nil
}

// chunk makes the TOC's entry for a chunk: that of its file for the first one.
func (p *packer) chunk(f *file, off, n int64, inner int, empty bool) *tocEntry {
	e := f.entry
	if off > 0 {
		e = &tocEntry{Type: typeChunk, Name: f.entry.Name, ChunkOffset: off}
		p.entries = append(p.entries, e)
	}
	e.InnerOffset = int64(inner)
	last, chunked := off+n == f.size, n != f.size
	if chunked && (!last || p.opts.Format == ZstdChunked) {
		e.ChunkSize = n
	}
	if chunked && empty {
		e.ChunkType = chunkZeros
	}
	return e
}

// end takes in what follows the last entry, which raw begins with. An eStargz
// goes on with its TOC there; others keep all of it.
func (p *packer) end(ctx context.Context, in *input, raw []byte) error {
	if p.opts.Format == EStargz {
		p.put(part{kind: otherPart}, raw[:in.before])
		p.put(part{kind: otherPart}, zeros[:in.pad-int64(in.before)]) // if the tar ends without
		return nil
	}
	p.split.end(raw[in.before:])
	p.put(part{kind: otherPart}, raw)
	buf := make([]byte, maxTail)
	for {
		n, err := io.ReadFull(&in.rec, buf)
		p.split.end(buf[:n])
		p.put(part{kind: otherPart}, buf[:n])
		if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
			return nil
		}
		if err == nil {
			err = p.flush(ctx)
		}
		if err != nil {
			return err
		}
	}
}
