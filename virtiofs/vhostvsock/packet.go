package vhostvsock

import (
	"encoding/binary"
)

// headerLen is the length of struct virtio_vsock_hdr in bytes.
const headerLen = 44

const typeStream = 1

// op is what a packet means.
type op uint16

const (
	opRequest       op = 1
	opResponse      op = 2
	opReset         op = 3
	opShutdown      op = 4
	opData          op = 5
	opCreditUpdate  op = 6
	opCreditRequest op = 7
)

// Flags of opShutdown.
const (
	shutReceive = 1 // the sender will receive no more
	shutSend    = 2 // the sender will send no more
)

// header is the head of each packet.
type header struct {
	srcCID, dstCID   uint64
	srcPort, dstPort uint32
	len              uint32 // of the payload in bytes
	typ              uint16
	op               op
	flags            uint32
	bufAlloc         uint32 // the sender's buffer for this connection, bytes
	fwdCnt           uint32 // bytes that the sender has consumed, modulo 2^32
}

func parseHeader(b *[headerLen]byte) header {
	le := binary.LittleEndian
	return header{
		srcCID: le.Uint64(b[0:]), dstCID: le.Uint64(b[8:]),
		srcPort: le.Uint32(b[16:]), dstPort: le.Uint32(b[20:]),
		len: le.Uint32(b[24:]), typ: le.Uint16(b[28:]), op: op(le.Uint16(b[30:])),
		flags: le.Uint32(b[32:]), bufAlloc: le.Uint32(b[36:]), fwdCnt: le.Uint32(b[40:]),
	}
}

func (h *header) encode() (b [headerLen]byte) {
	le := binary.LittleEndian
	le.PutUint64(b[0:], h.srcCID)
	le.PutUint64(b[8:], h.dstCID)
	le.PutUint32(b[16:], h.srcPort)
	le.PutUint32(b[20:], h.dstPort)
	le.PutUint32(b[24:], h.len)
	le.PutUint16(b[28:], h.typ)
	le.PutUint16(b[30:], uint16(h.op))
	le.PutUint32(b[32:], h.flags)
	le.PutUint32(b[36:], h.bufAlloc)
	le.PutUint32(b[40:], h.fwdCnt)
	return b
}

// behindHeader appends to dst the parts of a packet's buffers that hold payload,
// at most limit bytes of it, and returns how many those are.
func behindHeader(dst, bufs [][]byte, limit int) ([][]byte, int) {
	skip, room := headerLen, 0
	for _, b := range bufs {
		k := min(skip, len(b))
		skip -= k
		b = b[k:]
		if b = b[:min(len(b), limit-room)]; len(b) > 0 {
			dst = append(dst, b)
			room += len(b)
		}
	}
	return dst, room
}

// putHeader writes h to the beginning of bufs, which have room for it.
func putHeader(bufs [][]byte, h *header) {
	b := h.encode()
	rest := b[:]
	for i := 0; len(rest) > 0; i++ {
		rest = rest[copy(bufs[i], rest):]
	}
}
