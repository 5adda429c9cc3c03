package estargz

import (
	"bytes"
	"errors"
	"strconv"
)

// A footer is an empty gzip member whose extra field holds the offset of the
// TOC in 16 hexadecimal digits and a magic. It exists with a proper subfield
// header and, as stargz had it, without.
const (
	footerSize       = 51
	legacyFooterSize = 47
	magic            = "STARGZ"
	digits           = 16
)

// The member around the extra field: header with its flag, then an empty
// stored block (its final bit and type; encoders differ in what they put into
// the unused bits) and the checksum of nothing.
var (
	memberHead = []byte{0x1f, 0x8b, 8, 4}
	emptyTail  = []byte{0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0}
)

var errNoFooter = errors.New("no eStargz footer")

// parseFooter finds the footer at the end of tail, and returns its length and
// the offset of the TOC that it names.
func parseFooter(tail []byte) (size, toc int64, err error) {
	if b, ok := lastBytes(tail, footerSize); ok && bytes.HasPrefix(b[10:], []byte{26, 0, 'S', 'G', 22, 0}) {
		if toc, err = parseExtra(b, 16); err == nil {
			return footerSize, toc, nil
		}
	}
	if b, ok := lastBytes(tail, legacyFooterSize); ok && bytes.HasPrefix(b[10:], []byte{22, 0}) {
		if toc, err = parseExtra(b, 12); err == nil {
			return legacyFooterSize, toc, nil
		}
	}
	return 0, 0, errNoFooter
}

func lastBytes(b []byte, n int) ([]byte, bool) {
	if len(b) < n {
		return nil, false
	}
	return b[len(b)-n:], true
}

// parseExtra reads the offset at byte at of a footer and checks what surrounds
// it.
func parseExtra(b []byte, at int) (int64, error) {
	tail := b[at+digits+len(magic):]
	if !bytes.HasPrefix(b, memberHead) || string(b[at+digits:at+digits+len(magic)]) != magic ||
		tail[0]&7 != 1 || !bytes.Equal(tail[1:], emptyTail) {
		return 0, errNoFooter
	}
	off, err := strconv.ParseUint(string(b[at:at+digits]), 16, 63)
	return int64(off), err
}
