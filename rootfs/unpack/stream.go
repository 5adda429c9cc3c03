package unpack

import (
	"bufio"
	"encoding/binary"
	"io"
	"sync"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
)

// maxWindow bounds the memory of a zstd decoder, in bytes. It is what the zstd
// program itself accepts without being asked (ZSTD_WINDOWLOG_LIMIT_DEFAULT).
const maxWindow = 128 << 20

// Decompress reads a layer's blob as a tar, however it is packed. Media types are
// not asked: they are often wrong, the first bytes never are. It does not close r.
func Decompress(r io.Reader) (io.ReadCloser, error) {
	br := bufio.NewReaderSize(r, 64<<10)
	magic, err := br.Peek(4)
	if err != nil && err != io.EOF {
		return nil, err
	}
	switch {
	case len(magic) >= 3 && magic[0] == 0x1f && magic[1] == 0x8b && magic[2] == 8: // RFC 1952
		return gzip.NewReader(br)
	case len(magic) == 4 && isZstd(binary.LittleEndian.Uint32(magic)):
		// One goroutine: the layers are what runs in parallel.
		d, err := zstd.NewReader(br, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxWindow))
		if err != nil {
			return nil, err
		}
		return d.IOReadCloser(), nil
	}
	return io.NopCloser(br), nil
}

// isZstd knows zstd's frames, also the skippable ones that pzstd begins with
// (RFC 8878, 3.1.1 and 3.1.2).
func isZstd(magic uint32) bool {
	return magic == 0xfd2fb528 || magic&^0xf == 0x184d2a50
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
