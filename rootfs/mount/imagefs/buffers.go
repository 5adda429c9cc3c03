package imagefs

import (
	"context"
	"fmt"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
)

// bufferSizes are the size classes of reply buffers in bytes, ascending; the
// last is the largest read that a session allows.
var bufferSizes = [...]int{4 << 10, 16 << 10, 64 << 10, 128 << 10, 256 << 10, 512 << 10, 1 << 20}

// idleAfter is how long free buffers are kept when nothing is asked for.
const idleAfter = 2 * time.Second

// buffers hands out reply buffers of at most budget bytes at a time. They are
// mapped outside the Go heap: the collector would let a heap of live buffers
// double, and give them back late.
type buffers struct {
	budget int64
	inUse  *semaphore.Weighted
	idle   *time.Timer // trims when nobody has asked for a while

	mu     sync.Mutex
	free   [len(bufferSizes)][][]byte
	mapped int64 // in use and free, never above budget
	closed bool
}

func newBuffers(budget int64) *buffers {
	budget = max(budget, int64(bufferSizes[len(bufferSizes)-1]))
	b := &buffers{budget: budget, inUse: semaphore.NewWeighted(budget)}
	b.idle = time.AfterFunc(idleAfter, b.trim)
	return b
}

// get returns a buffer of n bytes, waiting for room under ctx.
func (b *buffers) get(ctx context.Context, n int) ([]byte, error) {
	class := bufferClass(n)
	if class < 0 {
		return nil, fmt.Errorf("reply of %d bytes is above the limit of %d", n, bufferSizes[len(bufferSizes)-1])
	}
	size := int64(bufferSizes[class])
	if err := b.inUse.Acquire(ctx, size); err != nil {
		return nil, err
	}
	buf, err := b.take(class)
	if err != nil {
		b.inUse.Release(size)
		return nil, fmt.Errorf("map a reply buffer of %d bytes: %w", size, err)
	}
	return buf[:n], nil
}

// put takes back what get returned.
func (b *buffers) put(buf []byte) {
	buf = buf[:cap(buf)]
	class := bufferClass(len(buf))
	b.mu.Lock()
	if b.closed {
		b.unmap(buf)
	} else {
		b.free[class] = append(b.free[class], buf)
		b.idle.Reset(idleAfter)
	}
	b.mu.Unlock()
	b.inUse.Release(int64(len(buf)))
}

func (b *buffers) take(class int) ([]byte, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if k := len(b.free[class]); k > 0 {
		buf := b.free[class][k-1]
		b.free[class] = b.free[class][:k-1]
		return buf, nil
	}
	size := bufferSizes[class]
	b.makeRoom(int64(size))
	buf, err := unix.Mmap(-1, 0, size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err == nil {
		b.mapped += int64(size)
	}
	return buf, err
}

// makeRoom unmaps free buffers of other classes until n more bytes fit the
// budget. What is in use cannot be in the way: the semaphore counts it.
// Precondition: mu is held.
func (b *buffers) makeRoom(n int64) {
	for class := range b.free {
		for len(b.free[class]) > 0 && b.mapped+n > b.budget {
			k := len(b.free[class]) - 1
			b.unmap(b.free[class][k])
			b.free[class] = b.free[class][:k]
		}
	}
}

// unmap gives a buffer back to the kernel. Precondition: mu is held.
func (b *buffers) unmap(buf []byte) {
	b.mapped -= int64(len(buf))
	_ = unix.Munmap(buf) // fails only for addresses that Mmap did not give
}

// trim unmaps every free buffer.
func (b *buffers) trim() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for class := range b.free {
		for _, buf := range b.free[class] {
			b.unmap(buf)
		}
		b.free[class] = nil
	}
}

// close unmaps what is free now, and the rest as it comes back.
func (b *buffers) close() {
	b.idle.Stop()
	b.mu.Lock()
	b.closed = true
	b.mu.Unlock()
	b.trim()
}

func bufferClass(n int) int {
	for i, size := range bufferSizes {
		if n <= size {
			return i
		}
	}
	return -1
}
