package estargz

import (
	"bytes"
	"fmt"
	"strconv"

	"github.com/containerd/errdefs"
)

// A footer is an empty gzip member whose extra field holds the offset of the
// TOC in 16 hexadecimal digits and a magic. It exists with a proper subfield
// header and, as stargz had it, without. Where the TOC is not in the blob the
// field has another magic and no offset.
const (
	footerSize         = 51
	legacyFooterSize   = 47
	externalFooterSize = 46
	magic              = "STARGZ"
	externalMagic      = "STARGZEXTERNALTOC"
	digits             = 16
)

// The member around the extra field: header with its flag, then an empty
// stored block (its final bit and type; encoders differ in what they put into
// the unused bits) and the checksum of nothing.
var (
	memberHead = []byte{0x1f, 0x8b, 8, 4}
	emptyTail  = []byte{0, 0, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 0, 0}
)

const extraAt = 10 // where the extra field's length is

// Starts of the extra fields: their length, and the header of the subfield.
var (
	extraHead    = []byte{26, 0, 'S', 'G', 22, 0}
	legacyHead   = []byte{22, 0}
	externalHead = []byte{21, 0, 'S', 'G', 17, 0}
)

var (
	errNoFooter = fmt.Errorf("no eStargz footer: %w", errdefs.ErrInvalidArgument)
	errExternal = fmt.Errorf("the TOC is not in the blob but in an image of its own, tagged as the layer's with %s behind: %w",
		externalSuffix, errdefs.ErrNotFound)
)

// parseFooter finds the footer at the end of tail, and returns its length and
// the offset of the TOC that it names. Errors are errNoFooter and errExternal.
func parseFooter(tail []byte) (size, toc int64, err error) {
	size = footerSize
	field, ok := extra(tail, size, extraHead)
	if !ok {
		size = legacyFooterSize
		field, ok = extra(tail, size, legacyHead)
	}
	if ok && string(field[digits:]) == magic {
		if off, err := strconv.ParseUint(string(field[:digits]), 16, 63); err == nil {
			return size, int64(off), nil
		}
	}
	if field, ok := extra(tail, externalFooterSize, externalHead); ok && string(field) == externalMagic {
		return 0, 0, errExternal
	}
	return 0, 0, errNoFooter
}

// extra returns what follows head in the extra field of the footer of n bytes
// that tail may end with.
func extra(tail []byte, n int64, head []byte) ([]byte, bool) {
	if int64(len(tail)) < n {
		return nil, false
	}
	b := tail[int64(len(tail))-n:]
	end := len(b) - 1 - len(emptyTail) // of the field
	if !bytes.HasPrefix(b, memberHead) || !bytes.HasPrefix(b[extraAt:], head) ||
		b[end]&7 != 1 || !bytes.Equal(b[end+1:], emptyTail) {
		return nil, false
	}
	return b[extraAt+len(head) : end], true
}
