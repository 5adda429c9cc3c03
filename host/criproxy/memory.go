package criproxy

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"os"
	"sync"

	"golang.org/x/sys/unix"
	"oras.land/oras-go/v2/registry/remote/auth"
)

// Memory holds credentials for the process that comes after this one: a file of
// memory, of which supervisor and service manager have descriptors.
//
// It has two slots, which are written in turn, so that a process may be killed at any
// time. A slot is a header of 24 bytes in little endian, and JSON:
//
//	0   8  generation; the slot with the larger one counts; 0 is an empty slot
//	8   8  bytes of JSON
//	16  4  CRC-32C of JSON
//	20  4  CRC-32C of the 20 bytes before
type Memory struct {
	mu         sync.Mutex
	file       *os.File
	generation uint64 // protected by mu
}

const (
	headerSize = 24
	// slotSize takes maxBytes and what JSON adds: at most six bytes for one.
	slotSize = 32 << 20
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// saved is one credential in memory.
type saved struct {
	Repository string
	Server     string `json:",omitempty"`
	Credential auth.Credential
}

// MemoryName is what files of memory are called.
const MemoryName = "tatami-cri"

// NewMemory makes an empty file of memory that children do not inherit by
// themselves. It is not executable where the kernel knows such files (Linux 6.3,
// which can be told to refuse others: sysctl vm.memfd_noexec).
func NewMemory() (*os.File, error) {
	fd, err := unix.MemfdCreate(MemoryName, unix.MFD_CLOEXEC|unix.MFD_NOEXEC_SEAL)
	if errors.Is(err, unix.EINVAL) {
		fd, err = unix.MemfdCreate(MemoryName, unix.MFD_CLOEXEC)
	}
	if err != nil {
		return nil, fmt.Errorf("memory for credentials: %w", err)
	}
	return os.NewFile(uintptr(fd), MemoryName), nil
}

// OpenMemory uses a file that NewMemory made, which it takes over. What cannot be read
// counts as empty.
func OpenMemory(f *os.File) *Memory { return &Memory{file: f} }

// Close lets go of the memory.
func (m *Memory) Close() error {
	if m == nil {
		return nil
	}
	return m.file.Close()
}

// load returns what was stored last.
func (m *Memory) load() (all []saved) {
	if m == nil {
		return nil
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	for slot := range int64(2) {
		generation, data := m.read(slot)
		var list []saved
		if generation <= m.generation || json.Unmarshal(data, &list) != nil {
			continue
		}
		m.generation, all = generation, list
	}
	return all
}

// read returns the content of a slot; generation 0 for none.
func (m *Memory) read(slot int64) (generation uint64, data []byte) {
	var h [headerSize]byte
	if _, err := m.file.ReadAt(h[:], slot*slotSize); err != nil {
		return 0, nil
	}
	n := binary.LittleEndian.Uint64(h[8:])
	if binary.LittleEndian.Uint32(h[20:]) != crc32.Checksum(h[:20], castagnoli) || n > slotSize-headerSize {
		return 0, nil
	}
	data = make([]byte, n)
	if _, err := m.file.ReadAt(data, slot*slotSize+headerSize); err != nil && !errors.Is(err, io.EOF) {
		return 0, nil
	}
	if binary.LittleEndian.Uint32(h[16:]) != crc32.Checksum(data, castagnoli) {
		return 0, nil
	}
	return binary.LittleEndian.Uint64(h[:]), data
}

// store writes all into the slot that does not count; then it does, and the other one
// is given back to the system, with what was forgotten.
func (m *Memory) store(all []saved) error {
	if m == nil {
		return nil
	}
	data, err := json.Marshal(all)
	if err != nil {
		return fmt.Errorf("memory for credentials: %w", err)
	}
	if len(data) > slotSize-headerSize {
		return fmt.Errorf("memory for credentials: %d bytes are too many", len(data))
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	next := m.generation + 1
	slot := int64(next % 2)
	if err := m.write(slot, next, data); err != nil {
		return fmt.Errorf("memory for credentials: %w", err)
	}
	m.generation = next
	return m.clear(1 - slot)
}

func (m *Memory) write(slot int64, generation uint64, data []byte) error {
	var h [headerSize]byte
	binary.LittleEndian.PutUint64(h[:], generation)
	binary.LittleEndian.PutUint64(h[8:], uint64(len(data)))
	binary.LittleEndian.PutUint32(h[16:], crc32.Checksum(data, castagnoli))
	binary.LittleEndian.PutUint32(h[20:], crc32.Checksum(h[:20], castagnoli))
	if _, err := m.file.WriteAt(data, slot*slotSize+headerSize); err != nil {
		return err
	}
	_, err := m.file.WriteAt(h[:], slot*slotSize)
	return err
}

// clear empties a slot.
func (m *Memory) clear(slot int64) error {
	err := unix.Fallocate(int(m.file.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, slot*slotSize, slotSize)
	if err != nil {
		return fmt.Errorf("memory for credentials: %w", err)
	}
	return nil
}
