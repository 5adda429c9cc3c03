package vhostuser

import (
	"encoding/binary"
	"fmt"
	"math"
	"os"

	"golang.org/x/sys/unix"
)

// handle carries out one message. A nil reply means that the message has none of
// its own.
func (s *session) handle(m *message) (reply []byte, err error) {
	switch m.req {
	case getFeatures:
		return encodeU64(s.offered()), nil
	case setFeatures:
		return nil, s.setFeatures(m.payload)
	case getProtoFeatures:
		return encodeU64(s.offeredProto()), nil
	case setProtoFeatures:
		return nil, s.setProto(m.payload)
	case getQueueNum:
		return encodeU64(uint64(len(s.rings))), nil
	case getMaxMemSlots:
		return encodeU64(maxMemSlots), nil
	case setMemTable, addMemReg, remMemReg:
		return nil, s.handleMemory(m)
	case setInflightFD: // from a Relay, which does not ask
		return nil, s.setInflight(m)
	case getConfig:
		return s.getConfig(m.payload)
	case getStatus:
		return encodeU64(s.status), nil
	case setStatus:
		return nil, s.setStatus(m.payload)
	case resetOwner, resetDevice:
		s.reset()
		return nil, nil
	case setOwner, setConfig: // one owner anyway; no field is writable
		return nil, nil
	}
	return s.handleRing(m)
}

func (s *session) handleRing(m *message) (reply []byte, err error) {
	switch m.req {
	case setVringNum, setVringBase, getVringBase, setVringEnable:
		return s.handleVringState(m)
	case setVringAddr:
		return nil, s.setVringAddr(m.payload)
	case setVringKick, setVringCall, setVringErr:
		return nil, s.handleVringFD(m)
	}
	return nil, fmt.Errorf("message %d is not supported", m.req)
}

func (s *session) offered() uint64 { return s.cfg.Features | ownFeatures }

func (s *session) setFeatures(p []byte) error {
	v, err := parseU64(p)
	if err != nil {
		return err
	}
	if unknown := v &^ s.offered(); unknown != 0 {
		return fmt.Errorf("%w: features %#x were not offered", ErrProtocol, unknown)
	}
	s.features = v
	// Without the protocol features there is no message to enable a ring.
	if v&featureProtocol == 0 {
		for i := range s.rings {
			s.rings[i].enabled = true
		}
	}
	return nil
}

func (s *session) offeredProto() uint64 {
	f := uint64(protoMQ | protoReplyAck | protoResetDevice | protoMemSlots | protoStatus)
	if s.cfg.Space != nil {
		f |= protoConfig
	}
	return f
}

func (s *session) setProto(p []byte) error {
	v, err := parseU64(p)
	if err != nil {
		return err
	}
	if unknown := v &^ s.offeredProto(); unknown != 0 {
		return fmt.Errorf("%w: protocol features %#x were not offered", ErrProtocol, unknown)
	}
	s.proto = v
	return nil
}

// setStatus keeps the driver's status; writing 0 is a device reset (virtio 1.2,
// section 2.1.2).
func (s *session) setStatus(p []byte) error {
	v, err := parseU64(p)
	if err != nil {
		return err
	}
	if v > math.MaxUint8 {
		return fmt.Errorf("%w: device status %#x", ErrProtocol, v)
	}
	if s.status = v; v == 0 {
		s.reset()
	}
	return nil
}

func (s *session) getConfig(p []byte) ([]byte, error) {
	c, err := parseConfig(p)
	if err != nil {
		return nil, err
	}
	space := s.cfg.Space
	if int(c.offset+c.size) > len(space) {
		return []byte{}, nil // an empty payload reports the failure
	}
	reply := append([]byte(nil), p[:configHeaderLen]...)
	return append(reply, space[c.offset:c.offset+c.size]...), nil
}

func (s *session) handleMemory(m *message) error {
	if m.req == setMemTable {
		rs, err := parseMemTable(m.payload)
		if err != nil {
			return err
		}
		return s.whilePaused(func() error { return s.setMemTable(rs, m) })
	}
	r, err := parseMemReg(m.payload)
	if err != nil {
		return err
	}
	if m.req == remMemReg {
		return s.whilePaused(func() error { return s.mem.remove(r) })
	}
	fd, err := m.takeFD()
	if err != nil {
		return err
	}
	return s.mem.add(r, fd)
}

// setMemTable replaces all memory. Precondition: no queue runs.
func (s *session) setMemTable(rs []region, m *message) error {
	if err := s.mem.clear(); err != nil {
		return err
	}
	for _, r := range rs {
		fd, err := m.takeFD()
		if err != nil {
			return err
		}
		if err := s.mem.add(r, fd); err != nil {
			return err
		}
	}
	return nil
}

func (s *session) ring(index uint32) (*vring, int, error) {
	if index >= uint32(len(s.rings)) {
		return nil, 0, fmt.Errorf("%w: queue %d of %d", ErrProtocol, index, len(s.rings))
	}
	return &s.rings[index], int(index), nil
}

func (s *session) handleVringState(m *message) ([]byte, error) {
	v, err := parseVringState(m.payload)
	if err != nil {
		return nil, err
	}
	r, i, err := s.ring(v.index)
	if err != nil {
		return nil, err
	}
	switch m.req {
	case setVringNum:
		return nil, r.setNum(v.num)
	case setVringBase:
		return nil, r.setBase(v.num)
	case setVringEnable:
		return nil, s.enable(i, v.num != 0)
	}
	return s.getVringBase(i), nil
}

func (r *vring) setNum(n uint32) error {
	if n == 0 || n > maxQueue || n&(n-1) != 0 {
		return fmt.Errorf("%w: ring of %d descriptors", ErrProtocol, n)
	}
	if r.queue != nil {
		return fmt.Errorf("%w: size of a running ring changed", ErrProtocol)
	}
	r.num = n
	return nil
}

func (r *vring) setBase(n uint32) error {
	if n > math.MaxUint16 {
		return fmt.Errorf("%w: ring index %d", ErrProtocol, n)
	}
	if r.queue != nil {
		return fmt.Errorf("%w: index of a running ring changed", ErrProtocol)
	}
	r.base = uint16(n)
	return nil
}

func (s *session) enable(i int, on bool) error {
	s.rings[i].enabled = on
	if !on {
		s.drain(i)
		return nil
	}
	return s.start(i)
}

// getVringBase stops the ring, which is what the front-end means by asking.
func (s *session) getVringBase(i int) []byte {
	s.drain(i)
	s.stop(i)
	r := &s.rings[i]
	closeFile(r.kick)
	r.kick = nil // the next one starts the ring again
	le := binary.LittleEndian
	return le.AppendUint32(le.AppendUint32(nil, uint32(i)), uint32(r.base))
}

func (s *session) setVringAddr(p []byte) error {
	a, err := parseVringAddr(p)
	if err != nil {
		return err
	}
	r, i, err := s.ring(a.index)
	if err != nil {
		return err
	}
	s.pause(i)
	r.addr, r.hasAddr = a, true
	return s.start(i)
}

func (s *session) handleVringFD(m *message) error {
	v, err := parseVringFD(m.payload)
	if err != nil {
		return err
	}
	_, i, err := s.ring(v.index)
	if err != nil {
		return err
	}
	var f *os.File
	if !v.none {
		if f, err = m.takeEvent(); err != nil {
			return err
		}
	}
	switch {
	case m.req == setVringCall:
		s.replaceCall(i, f)
	case m.req == setVringErr:
		s.replaceErr(i, f)
	case f == nil:
		return fmt.Errorf("queue %d without kicks: polling is not supported", i)
	default:
		return s.replaceKick(i, f)
	}
	return nil
}

func (m *message) takeEvent() (*os.File, error) {
	fd, err := m.takeFD()
	if err != nil {
		return nil, err
	}
	unix.CloseOnExec(fd)
	return newEvent(fd)
}
