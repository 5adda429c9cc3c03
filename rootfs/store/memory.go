package store

import (
	"container/list"
	"math/bits"
	"sync"
	"time"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// memory owns all chunk buffers of a store and bounds them: the buffer that each
// running fetch verifies in, and copies of chunks that were fetched ahead of
// their reader and are on no disk. The copies make way, oldest first; a fetch
// that finds no room even so waits in line for another fetch to end ([line]). Only
// fetches hold what cannot make way, each exactly one buffer, and all of those end, so
// waiting cannot deadlock.
type memory struct {
	limit int64
	pools [maxClass + 1]sync.Pool // of *[]byte, by class

	mu     sync.Mutex
	used   int64 // bytes of buffers and copies, protected by mu as all below
	blocks map[blockKey]*list.Element
	order  list.List // of *block, oldest first
	line   line
}

type blockKey struct {
	seg *segment
	i   int
}

// block is a verified chunk on its way to its reader.
type block struct {
	key   blockKey
	buf   *[]byte
	n     int64
	given int64 // bytes handed out; at n the reader has had it all
	at    time.Time
}

// Buffers come in powers of two from 4 KiB (class 12) to index.MaxChunk.
const (
	minClass = 12
	maxClass = 24
)

func classOf(n int64) int { return max(minClass, bits.Len64(uint64(n-1))) }

func newMemory(limit int64, s *sched.Scheduler) *memory {
	return &memory{limit: limit, blocks: map[blockKey]*list.Element{}, line: line{sched: s}}
}

func (m *memory) buffer(n int64) *[]byte {
	class := classOf(n)
	if b, ok := m.pools[class].Get().(*[]byte); ok {
		return b
	}
	b := make([]byte, 1<<class)
	return &b
}

func (m *memory) recycle(b *[]byte) { m.pools[classOf(int64(len(*b)))].Put(b) }

// put copies a chunk of which given bytes were handed out already. Without room
// it is dropped, and fetched again when it is wanted.
func (m *memory) put(key blockKey, b []byte, given int64) {
	size := int64(1) << classOf(int64(len(b)))
	m.mu.Lock()
	defer m.mu.Unlock()
	m.makeRoom(size)
	if m.used+size > m.limit || m.blocks[key] != nil {
		return
	}
	m.used += size
	k := &block{key: key, buf: m.buffer(int64(len(b))), n: int64(len(b)), given: given, at: time.Now()}
	copy(*k.buf, b)
	m.blocks[key] = m.order.PushBack(k)
}

// take copies bytes of a chunk from skip on into dst. ok is false when the chunk
// is not here; spent says that the reader has now had all of it and it was
// dropped.
func (m *memory) take(key blockKey, dst []byte, skip int64) (ok, spent bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.blocks[key]
	if e == nil {
		return false, false
	}
	return true, m.give(e, dst, skip)
}

// give copies bytes of a chunk, and drops it when the reader has now had all of it.
// Precondition: mu is held.
func (m *memory) give(e *list.Element, dst []byte, skip int64) (spent bool) {
	k := e.Value.(*block)
	k.given += int64(copy(dst, (*k.buf)[skip:k.n]))
	if k.given < k.n {
		return false
	}
	m.evict(e)
	return true
}

func (m *memory) has(key blockKey) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.blocks[key] != nil
}

func (m *memory) inUse() int64 {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.used
}

// expire drops the copies that were made before t.
func (m *memory) expire(t time.Time) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for e := m.order.Front(); e != nil && e.Value.(*block).at.Before(t); e = m.order.Front() {
		m.evict(e)
	}
}

// forget drops the copies of one segment.
func (m *memory) forget(g *segment) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for key, e := range m.blocks {
		if key.seg == g {
			m.evict(e)
		}
	}
}

// discard drops the copies of the chunks [from, to) of a segment.
func (m *memory) discard(g *segment, from, to int) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for i := from; i < to && len(m.blocks) > 0; i++ {
		if e := m.blocks[blockKey{g, i}]; e != nil {
			m.evict(e)
		}
	}
}

func (m *memory) drop() { m.expire(time.Now().Add(time.Hour)) }

// makeRoom drops copies until n more bytes fit. Precondition: mu is held.
func (m *memory) makeRoom(n int64) {
	for m.used+n > m.limit && m.order.Len() > 0 {
		m.evict(m.order.Front())
	}
}

// evict drops one copy. Precondition: mu is held.
func (m *memory) evict(e *list.Element) {
	k := m.order.Remove(e).(*block)
	delete(m.blocks, k.key)
	m.used -= int64(len(*k.buf))
	m.recycle(k.buf)
}
