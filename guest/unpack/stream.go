package unpack

import (
	"bufio"
	"bytes"
	"io"
	"sync"

	"github.com/klauspost/compress/zstd"

	"github.com/tatami-containers/tatami/rootfs/layer/gzip"
)

// decompress finds out how a blob is packed. Media types are not asked: they
// are often wrong, the first bytes never are.
func decompress(r io.Reader) (io.Reader, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	magic, err := br.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case gzip.IsGzip(magic):
		var decoders gzip.Pool // one layer, one decoder
		return decoders.NewReader(br), nil
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		// One goroutine: the layers are what runs in parallel.
		d, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true))
		if err != nil {
			return nil, err
		}
		return d, nil
	}
	return br, nil
}

const (
	aheadBlock  = 256 << 10 // bytes
	aheadBlocks = 4
)

// readAhead decompresses in a goroutine of its own, a bounded way ahead of the
// one that writes files.
type readAhead struct {
	full chan []byte
	free chan []byte
	stop chan struct{}
	done sync.WaitGroup
	err  error // written before full is closed

	block, rest []byte
}

func newReadAhead(r io.Reader) *readAhead {
	a := &readAhead{full: make(chan []byte, aheadBlocks), free: make(chan []byte, aheadBlocks), stop: make(chan struct{})}
	for range aheadBlocks {
		a.free <- make([]byte, aheadBlock)
	}
	a.done.Go(func() { a.fill(r) })
	return a
}

func (a *readAhead) fill(r io.Reader) {
	defer close(a.full)
	for {
		select {
		case <-a.stop:
			return
		case b := <-a.free:
			n, err := fillBlock(r, b[:cap(b)])
			if n > 0 {
				a.full <- b[:n]
			}
			if err != nil {
				a.err = err
				return
			}
		}
	}
}

// fillBlock is io.ReadFull, but for the errors: those of r as they are.
func fillBlock(r io.Reader, b []byte) (n int, err error) {
	for n < len(b) && err == nil {
		var m int
		m, err = r.Read(b[n:])
		n += m
	}
	return n, err
}

func (a *readAhead) Read(p []byte) (int, error) {
	if len(a.rest) == 0 {
		if a.block != nil {
			a.free <- a.block
			a.block = nil
		}
		b, ok := <-a.full
		if !ok {
			return 0, a.err
		}
		a.block, a.rest = b, b
	}
	n := copy(p, a.rest)
	a.rest = a.rest[n:]
	return n, nil
}

// Close ends the goroutine; it waits for the read that is under way.
func (a *readAhead) Close() error {
	close(a.stop)
	a.done.Wait()
	return nil
}
