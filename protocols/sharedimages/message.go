package sharedimages

import (
	"encoding/binary"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Version of the messages. Devices live as long as their machines, over upgrades of
// tatami-host: when there is another version, tatami-host has to serve those of the one
// before, too.
const Version = 1

// MaxData bounds what one message carries beside its header, in bytes: also one
// read. A packet with it fits into a socket's default buffer (net.core.wmem_default).
const MaxData = 128 << 10

// MaxCalls bounds the requests of a connection that have no answer yet. A client
// with more of them loses the connection.
const MaxCalls = 256

// headerLen is the length of an encoded Header.
const headerLen = 24

// MaxPacket bounds a packet in bytes.
const MaxPacket = headerLen + MaxData

// Op says what a message is about.
type Op uint16

// Requests of the client. Each has an ID that no other request of the connection
// has which waits for its answer; the answer has the same Op and ID.
const (
	// Hello comes first and once. N is the Version, the payload the sandbox's id.
	// In the answer N is the host's version.
	Hello Op = 1 + iota
	// Open asks for the image whose manifest digest is the payload. The answer has
	// a Handle, an Opened as payload, and a descriptor of the first Opened.Boot
	// bytes of the image.
	Open
	// Share asks for segment N of the image Handle: Off of the answer is where the
	// segment begins in the second of its two descriptors, data; the first is the
	// segment's state (package rootfs/store/shared).
	Share
	// Read asks for N bytes from Off on of the image Handle, at most MaxData.
	Read
	// Close gives Handle back. What is read of it is still answered.
	Close
	// Cancel has no answer: that of the request with its ID shall come now,
	// whatever it is.
	Cancel
	// Bye has no answer: the client ends the connection in order.
	Bye
)

// Gone is an event of the host, which has no ID: the image whose manifest digest
// is the payload is not the sandbox's any more. It can still be read through
// handles that are there, unless its sandbox is gone, too.
const Gone Op = 64

// known says whether there is such an Op.
func (o Op) known() bool { return o >= Hello && o <= Bye || o == Gone }

// Header is the fixed part of a message, on the wire in little endian: Op and
// Status of 2 bytes each, ID, Handle and N of 4, Off of 8. What a message does not
// use is zero.
type Header struct {
	Op     Op
	Status Status // of answers; of a failure the payload is the text
	ID     uint32
	Handle uint32
	N      uint32
	Off    int64
}

func (h *Header) put(b *[headerLen]byte) {
	le := binary.LittleEndian
	le.PutUint16(b[0:], uint16(h.Op))
	le.PutUint16(b[2:], uint16(h.Status))
	le.PutUint32(b[4:], h.ID)
	le.PutUint32(b[8:], h.Handle)
	le.PutUint32(b[12:], h.N)
	le.PutUint64(b[16:], uint64(h.Off))
}

// Decode takes a packet apart; the payload is part of it. What is no message is
// ErrInvalidArgument.
func Decode(packet []byte) (h Header, payload []byte, err error) {
	if len(packet) < headerLen || len(packet) > MaxPacket {
		return Header{}, nil, fmt.Errorf("packet of %d bytes, not %d to %d: %w", len(packet), headerLen, MaxPacket, errdefs.ErrInvalidArgument)
	}
	le := binary.LittleEndian
	h = Header{
		Op: Op(le.Uint16(packet)), Status: Status(le.Uint16(packet[2:])), ID: le.Uint32(packet[4:]),
		Handle: le.Uint32(packet[8:]), N: le.Uint32(packet[12:]), Off: int64(le.Uint64(packet[16:])),
	}
	if !h.Op.known() || h.Off < 0 {
		return Header{}, nil, fmt.Errorf("message with op %d and offset %d: %w", h.Op, h.Off, errdefs.ErrInvalidArgument)
	}
	return h, packet[headerLen:], nil
}

// maxSandbox bounds a sandbox's id in bytes.
const maxSandbox = 256

// CheckSandbox refuses what cannot be the id of a sandbox, as ErrInvalidArgument.
func CheckSandbox(id string) error {
	if id == "" || len(id) > maxSandbox {
		return fmt.Errorf("sandbox id of %d bytes, not 1 to %d: %w", len(id), maxSandbox, errdefs.ErrInvalidArgument)
	}
	return nil
}

// maxDigest bounds a digest's text: sha512 has 135 bytes.
const maxDigest = 256

// ParseManifest reads the payload of Open and Gone.
func ParseManifest(payload []byte) (digest.Digest, error) {
	d := digest.Digest(payload[:min(len(payload), maxDigest)])
	if err := d.Validate(); err != nil || len(payload) > maxDigest {
		return "", fmt.Errorf("manifest digest %.80q: %w", d, errdefs.ErrInvalidArgument)
	}
	return d, nil
}

// MaxSegments bounds the segments of an image.
const MaxSegments = 4096

// Opened describes an image. Its segments lie behind the first Boot bytes, by
// rising offset; what lies in none has to be read.
type Opened struct {
	Size, Boot int64 // bytes
	Segments   []Segment
}

// Segment is where a segment lies in the image, in bytes.
type Segment struct{ Off, Size int64 }

// Encode is the payload of the answer to Open: all numbers in 8 bytes each, little
// endian. ErrInvalidArgument is an image that cannot be described.
func (o *Opened) Encode() ([]byte, error) {
	if err := o.check(); err != nil {
		return nil, err
	}
	le := binary.LittleEndian
	b := le.AppendUint64(le.AppendUint64(nil, uint64(o.Size)), uint64(o.Boot))
	for _, s := range o.Segments {
		b = le.AppendUint64(le.AppendUint64(b, uint64(s.Off)), uint64(s.Size))
	}
	return b, nil
}

// DecodeOpened reads what Encode made.
func DecodeOpened(b []byte) (*Opened, error) {
	if len(b) < 16 || len(b)%16 != 0 || len(b) > 16*(1+MaxSegments) {
		return nil, fmt.Errorf("description of an image in %d bytes: %w", len(b), errdefs.ErrInvalidArgument)
	}
	pair := func(at int) (int64, int64) {
		return int64(binary.LittleEndian.Uint64(b[at:])), int64(binary.LittleEndian.Uint64(b[at+8:]))
	}
	o := &Opened{}
	o.Size, o.Boot = pair(0)
	for at := 16; at < len(b); at += 16 {
		off, size := pair(at)
		o.Segments = append(o.Segments, Segment{off, size})
	}
	return o, o.check()
}

func (o *Opened) check() error {
	ok := o.Size >= 0 && o.Boot >= 0 && o.Boot <= o.Size && len(o.Segments) <= MaxSegments
	end := o.Boot
	for _, s := range o.Segments {
		ok = ok && s.Off >= end && s.Size >= 0 && s.Off <= o.Size && s.Size <= o.Size-s.Off
		end = s.Off + s.Size
	}
	if !ok {
		return fmt.Errorf("image of %d bytes with a bootstrap of %d and %d segments that do not fit: %w", o.Size, o.Boot, len(o.Segments), errdefs.ErrInvalidArgument)
	}
	return nil
}
