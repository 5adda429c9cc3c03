package main

import (
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

const request = 4 << 10 // bytes

// inOrder reads the begin of the first large file.
func (t *tree) inOrder(p *plan) error {
	return t.read(p, p.requests, func(i int, _ int64) int64 { return int64(i) })
}

// atRandom reads anywhere in the first large file, the same places in every tree.
func (t *tree) atRandom(p *plan, readers int) error {
	var g errgroup.Group
	for r := range readers {
		rnd := rand.New(rand.NewPCG(uint64(r), 1))
		g.Go(func() error {
			return t.read(p, p.requests/readers, func(_ int, blocks int64) int64 { return rnd.Int64N(blocks) })
		})
	}
	return g.Wait()
}

// read makes n requests; block chooses the i-th of that many.
func (t *tree) read(p *plan, n int, block func(i int, blocks int64) int64) (err error) {
	if len(p.large) == 0 {
		return errors.New("the first tree has no file of more than 1 MiB")
	}
	f, err := os.OpenFile(filepath.Join(t.dir, p.large[0]), os.O_RDONLY|unix.O_DIRECT, 0)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	buf, err := unix.Mmap(-1, 0, request, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON) // aligned
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, unix.Munmap(buf)) }()
	blocks := st.Size() / request
	for i := range min(n, int(blocks)) {
		if _, err := io.ReadFull(io.NewSectionReader(f, request*block(i, blocks), request), buf); err != nil {
			return err
		}
	}
	return nil
}
