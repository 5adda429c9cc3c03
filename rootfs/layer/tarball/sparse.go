package tarball

import (
	"bytes"
	"errors"
	"io"
	"strings"
)

var errSparse = errors.New("invalid sparse map")

// sparse finds out whether h is a sparse file in one of GNU's formats, and if
// so sets its size and fragments. h.size has been the stored size until here.
func (r *reader) sparse(h *header, f format) error {
	var err error
	if h.flag == typeSparse {
		err = r.oldSparse(h, f)
	} else {
		err = r.paxSparse(h)
	}
	if err != nil || h.fragments == nil {
		return err
	}
	return h.checkFragments()
}

// checkFragments refuses maps that are not by rising offset inside the file.
func (h *header) checkFragments() error {
	switch h.flag {
	case typeHardlink, typeSymlink, typeChar, typeBlock, typeDir, typeFifo:
		return errSparse
	}
	if h.size < 0 {
		return errSparse
	}
	end := int64(0)
	for _, f := range h.fragments {
		if f.off < end || f.n < 0 || f.n > h.size-f.off {
			return errSparse
		}
		end = f.off + f.n
	}
	return nil
}

// oldSparse reads the map of the old GNU format: four fragments in the header,
// more in blocks behind it that the size does not count.
func (r *reader) oldSparse(h *header, f format) error {
	if f != formatGNU {
		return errSparse // star uses the same flag with another layout
	}
	var err error
	if h.size, err = number(r.block[483:495]); err != nil {
		return err
	}
	h.fragments = []fragment{}
	table := r.block[386:483]
	for read := len(table); read < maxSpecial; read += blockSize {
		if err := h.oldFragments(table[:len(table)/24*24]); err != nil {
			return err
		}
		if table[len(table)/24*24] == 0 {
			return nil
		}
		if err := r.full(r.block[:]); err != nil {
			return err
		}
		table = r.block[:]
	}
	return errSparse
}

// oldFragments reads fragments of two 12-byte numbers up to an empty one.
func (h *header) oldFragments(table []byte) error {
	for ; len(table) > 0 && table[0] != 0; table = table[24:] {
		off, err := number(table[:12])
		if err != nil {
			return err
		}
		n, err := number(table[12:24])
		if err != nil {
			return err
		}
		h.fragments = append(h.fragments, fragment{off, n})
	}
	return nil
}

// paxSparse reads the map of GNU's sparse formats 0.0, 0.1 and 1.0.
func (r *reader) paxSparse(h *header) error {
	major, minor := h.pax[sparseMajor], h.pax[sparseMinor]
	joined := h.pax[sparseMap]
	inData := major == "1" && minor == "0"
	inRecord := major == "0" && (minor == "0" || minor == "1") || major == "" && minor == "" && joined != ""
	if !inData && !inRecord {
		return nil
	}
	if name := h.pax[sparseName]; name != "" {
		h.name = name
	}
	size := h.pax[sparseSize]
	if size == "" {
		size = h.pax[sparseRealSize]
	}
	if size != "" {
		var err error
		if h.size, err = decimal(size); err != nil {
			return err
		}
	}
	if inData {
		return r.dataMap(h)
	}
	return h.recordMap(joined)
}

// recordMap reads a map that is a list of numbers in a pax record.
func (h *header) recordMap(joined string) error {
	n, err := decimal(h.pax[sparseNumBlocks])
	if err != nil || n < 0 {
		return errSparse
	}
	var numbers []string
	if joined != "" {
		numbers = strings.Split(joined, ",")
	}
	if len(numbers)%2 != 0 || int64(len(numbers)/2) != n {
		return errSparse
	}
	h.fragments = make([]fragment, 0, n)
	for i := 0; i < len(numbers); i += 2 {
		if err := h.fragment(numbers[i], numbers[i+1]); err != nil {
			return err
		}
	}
	return nil
}

func (h *header) fragment(off, n string) error {
	o, err := decimal(off)
	if err != nil {
		return errSparse
	}
	l, err := decimal(n)
	if err != nil {
		return errSparse
	}
	h.fragments = append(h.fragments, fragment{o, l})
	return nil
}

// dataMap reads the map of format 1.0: lines of decimal numbers at the start
// of the file's data, padded to whole blocks; how many pairs, then the pairs.
func (r *reader) dataMap(h *header) error {
	m := mapLines{r: r}
	first, err := m.line()
	if err != nil {
		return err
	}
	n, err := decimal(first)
	if err != nil || n < 0 || n > maxSpecial {
		return errSparse
	}
	h.fragments = []fragment{}
	for range n {
		off, err := m.line()
		if err != nil {
			return err
		}
		size, err := m.line()
		if err != nil {
			return err
		}
		if err := h.fragment(off, size); err != nil {
			return err
		}
	}
	return nil
}

// mapLines reads lines from the data of the current entry, in whole blocks.
type mapLines struct {
	r    *reader
	buf  []byte
	read int
}

func (m *mapLines) line() (string, error) {
	for {
		if line, rest, ok := bytes.Cut(m.buf, []byte{'\n'}); ok {
			m.buf = rest
			return string(line), nil
		}
		if m.read += blockSize; m.read > maxSpecial {
			return "", errSparse
		}
		if m.r.left < blockSize {
			return "", io.ErrUnexpectedEOF
		}
		var b block
		if err := m.r.full(b[:]); err != nil {
			return "", err
		}
		m.r.left -= blockSize
		m.buf = append(m.buf, b[:]...)
	}
}
