package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"
)

// ErrProtocol marks a message that breaks the vhost-user protocol; it ends the
// connection.
var ErrProtocol = errors.New("vhost-user protocol error")

// Feature bits of virtio that this package adds to a device's own.
const (
	featureIndirect = 1 << 28 // VIRTIO_F_INDIRECT_DESC
	featureEventIdx = 1 << 29 // VIRTIO_F_EVENT_IDX
	featureProtocol = 1 << 30 // VHOST_USER_F_PROTOCOL_FEATURES
	featureVersion1 = 1 << 32 // VIRTIO_F_VERSION_1

	ownFeatures = featureIndirect | featureEventIdx | featureProtocol | featureVersion1
)

// Protocol feature bits.
const (
	protoMQ          = 1 << 0
	protoReplyAck    = 1 << 3
	protoConfig      = 1 << 9
	protoResetDevice = 1 << 13
	protoMemSlots    = 1 << 15
	protoStatus      = 1 << 16
)

type request uint32

// Requests of the front-end.
const (
	getFeatures      request = 1
	setFeatures      request = 2
	setOwner         request = 3
	resetOwner       request = 4
	setMemTable      request = 5
	setVringNum      request = 8
	setVringAddr     request = 9
	setVringBase     request = 10
	getVringBase     request = 11
	setVringKick     request = 12
	setVringCall     request = 13
	setVringErr      request = 14
	getProtoFeatures request = 15
	setProtoFeatures request = 16
	getQueueNum      request = 17
	setVringEnable   request = 18
	getConfig        request = 24
	setConfig        request = 25
	resetDevice      request = 34
	setInflightFD    request = 32
	getMaxMemSlots   request = 36
	addMemReg        request = 37
	remMemReg        request = 38
	setStatus        request = 39
	getStatus        request = 40
)

const (
	headerLen  = 12   // bytes
	maxPayload = 4096 // bytes; the largest message we know has 12 + 256
	maxConfig  = 256  // bytes, VHOST_USER_MAX_CONFIG_SIZE
	maxFDs     = 8    // descriptors in one message, VHOST_MEMORY_BASELINE_NREGIONS

	flagVersion     = 1
	flagVersionMask = 3
	flagReply       = 1 << 2
	flagNeedReply   = 1 << 3
)

type header struct {
	req       request
	needReply bool
	size      uint32 // of the payload, at most maxPayload
}

func parseHeader(b [headerLen]byte) (header, error) {
	le := binary.LittleEndian
	h := header{req: request(le.Uint32(b[0:])), size: le.Uint32(b[8:])}
	flags := le.Uint32(b[4:])
	h.needReply = flags&flagNeedReply != 0
	switch {
	case flags&flagVersionMask != flagVersion:
		return h, fmt.Errorf("%w: message version %d", ErrProtocol, flags&flagVersionMask)
	case flags&^(flagVersionMask|flagNeedReply) != 0:
		return h, fmt.Errorf("%w: unknown message flags %#x", ErrProtocol, flags)
	case h.size > maxPayload:
		return h, fmt.Errorf("%w: message %d has %d bytes", ErrProtocol, h.req, h.size)
	}
	return h, nil
}

// appendReply encodes the answer to req.
func appendReply(req request, payload []byte) []byte {
	le := binary.LittleEndian
	b := make([]byte, 0, headerLen+len(payload))
	b = le.AppendUint32(b, uint32(req))
	b = le.AppendUint32(b, flagVersion|flagReply)
	b = le.AppendUint32(b, uint32(len(payload)))
	return append(b, payload...)
}

func encodeU64(v uint64) []byte { return binary.LittleEndian.AppendUint64(nil, v) }

func checkLen(p []byte, n int) error {
	if len(p) < n {
		return fmt.Errorf("%w: payload of %d bytes instead of %d", ErrProtocol, len(p), n)
	}
	return nil
}

func parseU64(p []byte) (uint64, error) {
	if err := checkLen(p, 8); err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint64(p), nil
}

// vringState is a ring's number and one value.
type vringState struct{ index, num uint32 }

func parseVringState(p []byte) (vringState, error) {
	if err := checkLen(p, 8); err != nil {
		return vringState{}, err
	}
	return vringState{binary.LittleEndian.Uint32(p), binary.LittleEndian.Uint32(p[4:])}, nil
}

// vringFD is a ring's number, and whether a descriptor comes with it.
type vringFD struct {
	index uint32
	none  bool
}

func parseVringFD(p []byte) (vringFD, error) {
	v, err := parseU64(p)
	if err == nil && v > 0x1ff {
		err = fmt.Errorf("%w: unknown bits in ring descriptor %#x", ErrProtocol, v)
	}
	return vringFD{index: uint32(v & 0xff), none: v&(1<<8) != 0}, err
}

// vringAddr holds a ring's parts as addresses in the front-end's own space.
type vringAddr struct {
	index             uint32
	desc, used, avail uint64
}

func parseVringAddr(p []byte) (vringAddr, error) {
	if err := checkLen(p, 40); err != nil {
		return vringAddr{}, err
	}
	le := binary.LittleEndian
	// The word at 4 asks for dirty logging, the one at 32 says where; the feature
	// is not offered.
	if flags := le.Uint32(p[4:]); flags != 0 {
		return vringAddr{}, fmt.Errorf("%w: unknown ring flags %#x", ErrProtocol, flags)
	}
	return vringAddr{le.Uint32(p), le.Uint64(p[8:]), le.Uint64(p[16:]), le.Uint64(p[24:])}, nil
}

// regionLen is the encoded length of a memory region in bytes.
const regionLen = 32

func parseRegion(p []byte) (region, error) {
	if err := checkLen(p, regionLen); err != nil {
		return region{}, err
	}
	le := binary.LittleEndian
	r := region{guest: le.Uint64(p), size: le.Uint64(p[8:]), user: le.Uint64(p[16:]), offset: le.Uint64(p[24:])}
	return r, r.check()
}

// parseMemTable reads SET_MEM_TABLE: count, padding, regions.
func parseMemTable(p []byte) ([]region, error) {
	if err := checkLen(p, 8); err != nil {
		return nil, err
	}
	n := binary.LittleEndian.Uint32(p)
	if n > maxFDs {
		return nil, fmt.Errorf("%w: %d memory regions in one table", ErrProtocol, n)
	}
	p = p[8:]
	out := make([]region, n)
	for i := range out {
		var err error
		if out[i], err = parseRegion(p); err != nil {
			return nil, err
		}
		p = p[regionLen:]
	}
	return out, nil
}

// parseMemReg reads ADD_MEM_REG and REM_MEM_REG: padding, one region.
func parseMemReg(p []byte) (region, error) {
	if err := checkLen(p, 8); err != nil {
		return region{}, err
	}
	return parseRegion(p[8:])
}

// configRange is a part of the configuration space; 12 bytes, then the content.
type configRange struct{ offset, size uint32 }

const configHeaderLen = 12

func parseConfig(p []byte) (configRange, error) {
	if err := checkLen(p, configHeaderLen); err != nil {
		return configRange{}, err
	}
	c := configRange{binary.LittleEndian.Uint32(p), binary.LittleEndian.Uint32(p[4:])}
	if c.size > maxConfig || c.offset > maxConfig || c.offset+c.size > maxConfig {
		return c, fmt.Errorf("%w: configuration range %d+%d", ErrProtocol, c.offset, c.size)
	}
	return c, nil
}
