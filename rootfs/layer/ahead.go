package layer

import (
	"context"
	"io"
	"sync"

	"github.com/tatami-containers/tatami/rootfs/sched"
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
	worker *sched.Worker // who reads from it

	full, free chan []byte
	err        error // the source's; set before full is closed

	buf, rest []byte // being read
}

// startAhead begins reading src until it ends or ctx is done, as worker.
// Whoever calls it waits for g, which can take as long as a Read of src.
func startAhead(ctx context.Context, g *sync.WaitGroup, src io.Reader, worker *sched.Worker) *ahead {
	a := &ahead{full: make(chan []byte, aheadBuffers), free: make(chan []byte, aheadBuffers)}
	for range aheadBuffers {
		a.free <- make([]byte, aheadSize)
	}
	g.Go(func() {
		defer close(a.full)
		a.err = a.run(ctx, src, worker)
	})
	return a
}

func (a *ahead) run(ctx context.Context, src io.Reader, worker *sched.Worker) error {
	for {
		var b []byte
		select {
		case b = <-a.free:
		case <-ctx.Done():
			return context.Cause(ctx)
		}
		if err := worker.Begin(); err != nil {
			return err
		}
		n, err := readMost(src, b[:aheadSize])
		worker.End()
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
		b, ok, err := a.next()
		a.buf, a.rest = b, b
		if !ok {
			return 0, a.err
		}
		if err != nil {
			return 0, err
		}
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// next returns what was read next; false when there is no more. It keeps the turn
// when something is there already.
func (a *ahead) next() (b []byte, ok bool, err error) {
	select {
	case b, ok = <-a.full:
		return b, ok, nil
	default:
	}
	err = a.worker.Wait(func() error {
		b, ok = <-a.full
		return nil
	})
	return b, ok, err
}
