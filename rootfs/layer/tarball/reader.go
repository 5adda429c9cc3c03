package tarball

import (
	"errors"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
)

// reader splits a tar stream into headers and data.
type reader struct {
	src   io.Reader
	off   int64 // bytes taken from src
	left  int64 // data of the current entry that was not read yet
	pad   int64 // to the next header behind that data
	err   error // what src failed with, if not its end
	block block
}

// took notes what a read from src came to.
func (r *reader) took(n int64, err error) {
	r.off += n
	if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
		r.err = err
	}
}

// invalid is the error for what is wrong at a byte, unless src is to blame.
func (r *reader) invalid(at int64, what error) error {
	if r.err != nil {
		return r.err
	}
	return fmt.Errorf("tar stream at byte %d: %w: %w", at, what, errdefs.ErrInvalidArgument)
}

// full fills p, and has io.ErrUnexpectedEOF when the stream ends before.
func (r *reader) full(p []byte) error {
	n, err := io.ReadFull(r.src, p)
	r.took(int64(n), err)
	if err == io.EOF {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// skip drops n bytes.
func (r *reader) skip(n int64) error {
	k, err := io.CopyN(io.Discard, r.src, n)
	r.took(k, err)
	if errors.Is(err, io.EOF) {
		err = io.ErrUnexpectedEOF
	}
	return err
}

// Read reads the data of the current entry, without expanding holes.
func (r *reader) Read(p []byte) (int, error) {
	if r.left == 0 {
		return 0, io.EOF
	}
	n, err := r.src.Read(p[:min(int64(len(p)), r.left)])
	r.took(int64(n), err)
	r.left -= int64(n)
	if errors.Is(err, io.EOF) && r.left > 0 {
		err = r.invalid(r.off, io.ErrUnexpectedEOF)
	}
	return n, err
}

// next goes to the next entry and returns its header, or io.EOF at the end.
func (r *reader) next() (*header, error) {
	var pax map[string]string
	var longName, longLink string
	for {
		if err := r.finish(); err != nil {
			return nil, err
		}
		at := r.off
		h, f, err := r.header()
		if err != nil {
			return nil, err
		}
		if err := r.begin(h); err != nil {
			return nil, r.invalid(at, err)
		}
		switch h.flag {
		case typePax:
			pax, err = r.pax()
		case typePaxGlobal: // checked, then forgotten with what came before it
			_, err = r.pax()
			pax, longName, longLink = nil, "", ""
		case typeLongName:
			longName, err = r.long()
		case typeLongLink:
			longLink, err = r.long()
		default:
			return h, r.complete(h, f, at, pax, longName, longLink)
		}
		if err != nil {
			return nil, r.invalid(at, err)
		}
	}
}

// finish skips what is left of the current entry. A stream that ends inside
// the padding is complete.
func (r *reader) finish() error {
	if err := r.skip(r.left); err != nil {
		return r.invalid(r.off, err)
	}
	r.left = 0
	err := r.skip(r.pad)
	r.pad = 0
	if errors.Is(err, io.ErrUnexpectedEOF) {
		return nil
	}
	return err
}

// header reads a header block. Two blocks of zeros end the stream, and so does
// its end at a header or behind one block of zeros.
func (r *reader) header() (*header, format, error) {
	for zeros := 0; ; zeros++ {
		at := r.off
		n, err := io.ReadFull(r.src, r.block[:])
		r.took(int64(n), err)
		if errors.Is(err, io.ErrUnexpectedEOF) {
			return nil, 0, r.invalid(at, err)
		}
		if err != nil {
			return nil, 0, err
		}
		if r.block == (block{}) {
			if zeros > 0 {
				return nil, 0, io.EOF
			}
			continue
		}
		if zeros > 0 {
			return nil, 0, r.invalid(at, errors.New("data behind a block of zeros"))
		}
		h, f, err := r.block.parse()
		if err != nil {
			return nil, 0, r.invalid(at, err)
		}
		return h, f, nil
	}
}

// begin sets up the data behind a header.
func (r *reader) begin(h *header) error {
	n := h.stored()
	if n < 0 {
		return errors.New("negative size")
	}
	r.left, r.pad = n, -n&(blockSize-1)
	return nil
}

// complete applies what extended headers say to the entry that they precede.
func (r *reader) complete(h *header, f format, at int64, pax map[string]string, longName, longLink string) error {
	if err := h.merge(pax); err != nil {
		return r.invalid(at, err)
	}
	if longName != "" {
		h.name = longName
	}
	if longLink != "" {
		h.link = longLink
	}
	if h.flag == typeOldFile {
		h.flag = typeFile
		if n := len(h.name); n > 0 && h.name[n-1] == '/' {
			h.flag = typeDir
		}
	}
	if err := r.begin(h); err != nil { // pax may have changed the size
		return r.invalid(at, err)
	}
	if err := r.sparse(h, f); err != nil {
		return r.invalid(at, err)
	}
	return nil
}

// special reads the data of an extended header.
func (r *reader) special() ([]byte, error) {
	if r.left > maxSpecial {
		return nil, errors.New("extended header above 1 MiB")
	}
	b := make([]byte, r.left)
	if err := r.full(b); err != nil {
		return nil, err
	}
	r.left = 0
	return b, nil
}

func (r *reader) pax() (map[string]string, error) {
	b, err := r.special()
	if err != nil {
		return nil, err
	}
	return parsePax(string(b))
}

func (r *reader) long() (string, error) {
	b, err := r.special()
	return text(b), err
}
