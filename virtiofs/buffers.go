package virtiofs

import (
	"context"
	"math/bits"
	"sync"

	"golang.org/x/sync/semaphore"
)

// Classes of reply buffers are powers of two from a page to maxRead.
const (
	minBufferBits = 12
	maxBufferBits = 20
)

// buffers hands out at most a budget of bytes at a time.
type buffers struct {
	room *semaphore.Weighted
	free [maxBufferBits - minBufferBits + 1]sync.Pool // *[]byte
}

func newBuffers(budget int64) *buffers { return &buffers{room: semaphore.NewWeighted(budget)} }

func bufferClass(n int) int { return max(bits.Len(uint(n-1)), minBufferBits) - minBufferBits }

// get returns a buffer of n bytes, 1 to maxRead, waiting for room under ctx.
func (b *buffers) get(ctx context.Context, n int) ([]byte, error) {
	class := bufferClass(n)
	size := 1 << (class + minBufferBits)
	if err := b.room.Acquire(ctx, int64(size)); err != nil {
		return nil, err
	}
	if p, ok := b.free[class].Get().(*[]byte); ok {
		return (*p)[:n], nil
	}
	return make([]byte, n, size), nil
}

// put takes back what get returned.
func (b *buffers) put(buf []byte) {
	buf = buf[:cap(buf)]
	b.free[bufferClass(len(buf))].Put(&buf)
	b.room.Release(int64(len(buf)))
}
