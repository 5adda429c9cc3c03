package layer

import (
	"context"
	"io"
	"sync"
)

// How far a stage may run ahead of the next one: enough that neither waits for
// the other's every buffer, little enough to stay in the caches.
const (
	aheadBuffers = 4
	aheadSize    = 128 << 10 // bytes
)

// ahead is a stage of a pipeline: it reads from a source in a goroutine of its
// own, and others read from it what that goroutine got.
type ahead struct {
	full, free chan []byte
	err        error // the source's; set before full is closed

	buf, rest []byte // being read
}

// startAhead begins reading src until it ends or ctx is done. Whoever calls it
// waits for g, which can take as long as a Read of src.
func startAhead(ctx context.Context, g *sync.WaitGroup, src io.Reader) *ahead {
	a := &ahead{full: make(chan []byte, aheadBuffers), free: make(chan []byte, aheadBuffers)}
	for range aheadBuffers {
		a.free <- make([]byte, aheadSize)
	}
	g.Go(func() {
		defer close(a.full)
		a.err = a.run(ctx, src)
	})
	return a
}

func (a *ahead) run(ctx context.Context, src io.Reader) error {
	for {
		var b []byte
		select {
		case b = <-a.free:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		n, err := readMost(src, b[:aheadSize])
		a.full <- b[:n] // has room for every buffer
		if err != nil {
			return err
		}
	}
}

// readMost fills p, or less of it when src fails or ends.
func readMost(src io.Reader, p []byte) (n int, err error) {
	for n < len(p) && err == nil {
		var k int
		k, err = src.Read(p[n:])
		n += k
	}
	return n, err
}

// Read implements io.Reader, for one goroutine.
func (a *ahead) Read(p []byte) (int, error) {
	for len(a.rest) == 0 {
		if a.buf != nil {
			a.free <- a.buf // has room for every buffer
		}
		b, ok := <-a.full
		if !ok {
			a.buf = nil
			return 0, a.err
		}
		a.buf, a.rest = b, b
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}
