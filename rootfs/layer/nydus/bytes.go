package nydus

import "encoding/binary"

// Everything in RAFS is little-endian.
var le = binary.LittleEndian

// content is a file that is read at offsets which the file itself gives.
type content []byte

// at returns the n bytes from off on, if the file has them: the one check of
// bounds that everything goes through.
func (c content) at(off, n uint64) ([]byte, error) {
	size := uint64(len(c))
	if off > size || n > size-off {
		return nil, invalid("range %d+%d is not within its %d bytes", off, n, size)
	}
	return c[off : off+n], nil
}

// table returns count records of size bytes each from off on.
func (c content) table(off, count, size uint64) ([]byte, error) {
	if count > uint64(len(c)) {
		return nil, invalid("%d records are more than its %d bytes", count, len(c))
	}
	return c.at(off, count*size)
}
