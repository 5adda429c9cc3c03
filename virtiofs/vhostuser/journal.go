package vhostuser

import (
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"
)

// journal is what a VMM has told and still holds, so that it can be told again.
type journal struct {
	record *message // SET_INFLIGHT_FD

	owner, features, proto, status *message
	regions                        []slot
	rings                          []ringState
}

// slot is a memory region with its descriptor in ADD_MEM_REG's words, in which
// SET_MEM_TABLE can be told as well.
type slot struct {
	region
	add *message
}

// ringState is the last word on each part of a ring.
type ringState struct {
	num, base, addr, call, err, kick, enable *message
}

// newRecord makes the memory in which n queues note their chains.
func newRecord(n int) (*message, error) {
	fd, err := unix.MemfdCreate("inflight", unix.MFD_CLOEXEC)
	if err != nil {
		return nil, fmt.Errorf("make record of chains: %w", err)
	}
	// Room for the largest rings: what they do not use is not there.
	a := inflightArea{size: uint64(n * inflightBytes(maxQueue)), queues: uint16(n), queueSize: maxQueue}
	if err := unix.Ftruncate(fd, int64(a.size)); err != nil {
		return nil, errors.Join(fmt.Errorf("make record of chains: %w", err), unix.Close(fd))
	}
	return &message{header: header{req: setInflightFD}, payload: a.encode(), fds: []int{fd}}, nil
}

// answered tells whether m gets a reply.
func (j *journal) answered(m *message) bool {
	switch m.req {
	case getFeatures, getProtoFeatures, getQueueNum, getVringBase, getConfig, getMaxMemSlots, getStatus:
		return true
	}
	return m.needReply && j.acks()
}

// acks tells whether a reply was agreed on for all messages that want one.
func (j *journal) acks() bool {
	if j.proto == nil {
		return false
	}
	v, err := parseU64(j.proto.payload)
	return err == nil && v&protoReplyAck != 0
}

// apply remembers m, which was answered with reply, nil for no answer. It takes the
// descriptors that it keeps.
func (j *journal) apply(m *message, reply []byte) error {
	if m.req != getVringBase && reply != nil {
		if v, err := parseU64(reply); err != nil || v != 0 {
			return nil // refused, or only a question
		}
	}
	switch m.req {
	case setOwner:
		keep(&j.owner, m)
	case setFeatures:
		keep(&j.features, m)
	case setProtoFeatures:
		keep(&j.proto, m)
	case setStatus:
		keep(&j.status, m)
		if v, err := parseU64(m.payload); err == nil && v == 0 {
			return j.reset()
		}
	case resetOwner, resetDevice:
		return j.reset()
	case setMemTable, addMemReg, remMemReg:
		return j.memory(m)
	case setVringNum, setVringBase, getVringBase, setVringAddr, setVringEnable:
		return j.ring(m, reply)
	case setVringKick, setVringCall, setVringErr:
		return j.ringFD(m)
	}
	return nil
}

// keep replaces what was told before. It takes the descriptors.
func keep(at **message, m *message) {
	drop(at)
	k := *m
	k.needReply = false // nobody waits for it any more
	m.fds = nil
	*at = &k
}

func drop(at **message) {
	if *at != nil {
		(*at).closeFDs()
		*at = nil
	}
}

// reset is what a device reset leaves. The driver has forgotten its chains.
func (j *journal) reset() error {
	var errs []error
	for i := range j.rings {
		drop(&j.rings[i].enable)
		errs = append(errs, forgetRecord(j.record.fds[0], i))
	}
	return errors.Join(errs...)
}

func (j *journal) memory(m *message) error {
	if m.req == setMemTable {
		return j.setTable(m)
	}
	r, err := parseMemReg(m.payload)
	if err != nil {
		return err
	}
	if m.req == addMemReg {
		return j.add(r, m)
	}
	for i := range j.regions {
		if j.regions[i].same(&r) {
			j.regions[i].add.closeFDs()
			j.regions = append(j.regions[:i], j.regions[i+1:]...)
			break
		}
	}
	return nil
}

func (j *journal) setTable(m *message) error {
	rs, err := parseMemTable(m.payload)
	if err != nil {
		return err
	}
	for _, s := range j.regions {
		s.add.closeFDs()
	}
	j.regions = nil
	for _, r := range rs {
		if err := j.add(r, m); err != nil {
			return err
		}
	}
	return nil
}

// add keeps a region with the next descriptor of m.
func (j *journal) add(r region, m *message) error {
	if len(j.regions) >= maxMemSlots {
		return nil // refused
	}
	fd, err := m.takeFD()
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	p := make([]byte, 8, 8+regionLen) // padding
	for _, v := range []uint64{r.guest, r.size, r.user, r.offset} {
		p = le.AppendUint64(p, v)
	}
	j.regions = append(j.regions, slot{r, &message{header: header{req: addMemReg}, payload: p, fds: []int{fd}}})
	return nil
}

func (j *journal) at(index uint32) (*ringState, error) {
	if index >= uint32(len(j.rings)) {
		return nil, fmt.Errorf("%w: queue %d of %d", ErrProtocol, index, len(j.rings))
	}
	return &j.rings[index], nil
}

func (j *journal) ring(m *message, reply []byte) error {
	if len(m.payload) < 8 {
		return checkLen(m.payload, 8)
	}
	r, err := j.at(binary.LittleEndian.Uint32(m.payload))
	if err != nil {
		return err
	}
	switch m.req {
	case setVringNum:
		keep(&r.num, m)
	case setVringBase:
		keep(&r.base, m)
	case setVringAddr:
		keep(&r.addr, m)
	case setVringEnable:
		keep(&r.enable, m)
	case getVringBase: // the ring stands until it gets another kick
		drop(&r.kick)
		keep(&r.base, &message{header: header{req: setVringBase}, payload: reply})
		// Not before the answer: a process that takes over must see what was done.
		return forgetRecord(j.record.fds[0], int(binary.LittleEndian.Uint32(m.payload)))
	}
	return nil
}

func (j *journal) ringFD(m *message) error {
	v, err := parseVringFD(m.payload)
	if err != nil {
		return err
	}
	r, err := j.at(v.index)
	if err != nil {
		return err
	}
	switch m.req {
	case setVringKick:
		keep(&r.kick, m)
	case setVringCall:
		keep(&r.call, m)
	case setVringErr:
		keep(&r.err, m)
	}
	return nil
}

// messages tell a new process everything: what the rings need before the rings, and
// last what starts them.
func (j *journal) messages() []*message {
	all := []*message{j.record, j.owner, j.features, j.proto, j.status}
	for _, s := range j.regions {
		all = append(all, s.add)
	}
	for i := range j.rings {
		r := &j.rings[i]
		all = append(all, r.num, r.base, r.addr, r.call, r.err, r.enable, r.kick)
	}
	var told []*message
	for _, m := range all {
		if m != nil {
			told = append(told, m)
		}
	}
	return told
}

func (j *journal) close() {
	for _, m := range j.messages() {
		m.closeFDs()
	}
}
