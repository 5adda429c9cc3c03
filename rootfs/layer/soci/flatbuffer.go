package soci

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// How much of a FlatBuffer may be read. Offsets may lead to the same bytes many
// times, by which a short one could be read as a very long one. Writers may
// share strings, but no honest one gets near this.
const (
	maxSharing = 8  // times the length of the buffer
	tableCost  = 64 // bytes that one table counts as
)

var errSharing = errors.New("the same bytes are used too often")

// buffer is a FlatBuffer (https://flatbuffers.dev/internals/) that nobody has
// checked: every access is. The first one that leads out of it is kept in err;
// from then on all fields are absent. Positions are bytes from its start.
type buffer struct {
	data []byte
	left int64 // bytes that may be read yet, see maxSharing
	err  error
}

func newBuffer(data []byte) *buffer {
	return &buffer{data: data, left: maxSharing * int64(len(data))}
}

// take returns n bytes at a position, or nil.
func (b *buffer) take(at, n int64) []byte {
	if size := int64(len(b.data)); b.err == nil && (at < 0 || n < 0 || n > size || at > size-n) {
		b.err = fmt.Errorf("%d bytes at %d are not within the %d that there are", n, at, size)
	}
	if b.err != nil {
		return nil
	}
	return b.data[at : at+n]
}

// spend counts n bytes as read.
func (b *buffer) spend(n int64) {
	if b.left -= n; b.left < 0 && b.err == nil {
		b.err = errSharing
	}
}

func (b *buffer) u16(at int64) uint16 {
	if p := b.take(at, 2); p != nil {
		return binary.LittleEndian.Uint16(p)
	}
	return 0
}

func (b *buffer) u32(at int64) uint32 {
	if p := b.take(at, 4); p != nil {
		return binary.LittleEndian.Uint32(p)
	}
	return 0
}

func (b *buffer) u64(at int64) uint64 {
	if p := b.take(at, 8); p != nil {
		return binary.LittleEndian.Uint64(p)
	}
	return 0
}

// follow is the position that the offset at a position leads to.
func (b *buffer) follow(at int64) int64 { return at + int64(b.u32(at)) }

// text reads the string at a position.
func (b *buffer) text(at int64) string {
	n := int64(b.u32(at))
	p := b.take(at+4, n)
	b.spend(n)
	if b.err != nil {
		return ""
	}
	return string(p)
}

// table is one table of a buffer. The zero value is one without fields.
type table struct {
	b      *buffer
	at     int64
	fields []byte // places of the fields in the table, 2 bytes each, 0 for none
}

// root is the table that the buffer is about.
func (b *buffer) root() table { return b.table(b.follow(0)) }

// table reads the table at a position. Its first four bytes are the signed
// distance back to its vtable, which begins with its own and the table's size.
func (b *buffer) table(at int64) table {
	b.spend(tableCost)
	vtable := at - int64(int32(b.u32(at)))
	size := int64(b.u16(vtable))
	if b.err == nil && size < 4 {
		b.err = fmt.Errorf("vtable of %d bytes at %d", size, vtable)
	}
	return table{b, at, b.take(vtable+4, size-4)}
}

// field is the position of a field by its number in the schema; 0 if the table
// does not have it.
func (t table) field(id int) int64 {
	if 2*id+2 > len(t.fields) {
		return 0
	}
	off := int64(binary.LittleEndian.Uint16(t.fields[2*id:]))
	if off == 0 {
		return 0
	}
	return t.at + off
}

// byte, int, uint and long read numbers; none is the value of an absent field.

func (t table) byte(id int, none byte) byte {
	if at := t.field(id); at != 0 {
		if p := t.b.take(at, 1); p != nil {
			return p[0]
		}
	}
	return none
}

func (t table) uint(id int) uint32 {
	if at := t.field(id); at != 0 {
		return t.b.u32(at)
	}
	return 0
}

func (t table) int(id int) int32 { return int32(t.uint(id)) }

func (t table) long(id int) int64 {
	if at := t.field(id); at != 0 {
		return int64(t.b.u64(at))
	}
	return 0
}

// text reads a string, empty if absent.
func (t table) text(id int) string {
	if at := t.field(id); at != 0 {
		return t.b.text(t.b.follow(at))
	}
	return ""
}

// table reads a table, one without fields if absent.
func (t table) table(id int) table {
	if at := t.field(id); at != 0 {
		return t.b.table(t.b.follow(at))
	}
	return table{}
}

// vector reads a list whose elements have size bytes each: where its first one
// is, and their number.
func (t table) vector(id int, size int64) (at int64, n int) {
	if at = t.field(id); at == 0 {
		return 0, 0
	}
	at = t.b.follow(at)
	count := int64(t.b.u32(at))
	if t.b.take(at+4, count*size) == nil {
		return 0, 0
	}
	return at + 4, int(count)
}

// bytes returns a list of bytes as a part of the buffer.
func (t table) bytes(id int) []byte {
	at, n := t.vector(id, 1)
	if n == 0 {
		return nil
	}
	return t.b.take(at, int64(n))
}

// each calls f with the position of what each offset in a list leads to, until
// it fails or the buffer turns out to be broken.
func (t table) each(id int, f func(at int64) error) error {
	at, n := t.vector(id, 4)
	for i := range n {
		err := f(t.b.follow(at + 4*int64(i)))
		if t.b.err != nil {
			return t.b.err
		}
		if err != nil {
			return err
		}
	}
	return nil
}
