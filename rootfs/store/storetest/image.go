// Package storetest has images made of random bytes and a source that serves
// them, counts every byte and fails on demand. Only tests import it.
package storetest

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Image is an index and all the bytes that it stands for.
type Image struct {
	Index *index.Image
	Plain []byte // bootstrap and segments
}

// Segment is a segment's bytes and table.
type Segment struct {
	Table *index.Table
	Plain []byte
}

// Units makes a segment of n random bytes, a multiple of index.BlockSize, in
// chunks of index.UnitSize, with a hole of three units in every sixteen.
func Units(seed uint64, n int64) Segment {
	s := random(seed, n)
	for off := int64(0); off < n; off += index.UnitSize {
		end := min(off+index.UnitSize, n)
		if k := off / index.UnitSize % 16; k >= 5 && k < 8 {
			clear(s.Plain[off:end])
			continue
		}
		s.add(off, end)
	}
	return s
}

// Solid makes a segment like Units, without holes.
func Solid(seed uint64, n int64) Segment {
	s := random(seed, n)
	for off := int64(0); off < n; off += index.UnitSize {
		s.add(off, min(off+index.UnitSize, n))
	}
	return s
}

// Cut makes a segment of the given parts, one behind the other, each cut into
// chunks of n bytes. A part is whole blocks.
func Cut(n int64, parts ...[]byte) Segment {
	s := Segment{Table: &index.Table{}}
	for _, part := range parts {
		start := int64(len(s.Plain))
		s.Plain = append(s.Plain, part...)
		end := int64(len(s.Plain))
		for off := start; off < end; off += n {
			s.add(off, min(off+n, end))
		}
	}
	s.Table.Size = int64(len(s.Plain))
	return s
}

// Files makes a segment of files with the given sizes in bytes, each cut into
// chunks of at most chunk bytes.
func Files(seed uint64, chunk int64, sizes ...int64) Segment {
	var l index.Layout
	offs := make([]int64, len(sizes))
	for i, n := range sizes {
		offs[i] = l.Place(n)
	}
	s := random(seed, l.Size())
	for i, n := range sizes {
		clear(s.Plain[offs[i]+n : offs[i]+index.RoundUp(n)])
		for off := int64(0); off < n; off += chunk {
			s.add(offs[i]+off, offs[i]+min(off+chunk, n))
		}
	}
	return s
}

func random(seed uint64, n int64) Segment {
	if n%index.BlockSize != 0 {
		panic(fmt.Sprintf("segment of %d bytes is not whole blocks", n))
	}
	plain := make([]byte, n)
	key := sha256.Sum256(fmt.Append(nil, seed))
	_, _ = rand.NewChaCha8(key).Read(plain) // never fails
	return Segment{Table: &index.Table{Size: n}, Plain: plain}
}

func (s *Segment) add(off, end int64) {
	s.Table.Chunks = append(s.Table.Chunks, index.Chunk{Off: off, Len: end - off, Sum: sha256.Sum256(s.Plain[off:end])})
}

// Summed is the segment with sums of another algorithm; those of index.Vouched
// are names made from the bytes.
func (s Segment) Summed(a index.Algorithm) Segment {
	t := &index.Table{Size: s.Table.Size, Algorithm: a}
	for _, c := range s.Table.Chunks {
		c.Sum = a.Sum(s.Plain[c.Off:c.End()])
		if a == index.Vouched {
			c.Sum = sha256.Sum256(append([]byte("name of "), s.Plain[c.Off:c.End()]...))
		}
		t.Chunks = append(t.Chunks, c)
	}
	return Segment{Table: t, Plain: s.Plain}
}

// Layer is the blob digest that the segment gets in an image.
func (s Segment) Layer() digest.Digest { return digest.FromString("layer of " + s.Table.ID().String()) }

// NewImage puts segments behind a bootstrap of random bytes. The name decides
// the manifest digest and the bootstrap.
func NewImage(name string, segments ...Segment) *Image {
	boot := random(uint64(len(name)), 3*index.BlockSize).Plain
	copy(boot, name)
	img := &Image{Index: &index.Image{Manifest: digest.FromString(name), Bootstrap: boot}, Plain: append([]byte{}, boot...)}
	for _, s := range segments {
		img.Index.Segments = append(img.Index.Segments, index.Segment{
			ID: s.Table.ID(), Layer: s.Layer(), Off: int64(len(img.Plain)), Table: s.Table,
		})
		img.Plain = append(img.Plain, s.Plain...)
	}
	return img
}
