package nydus

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/bootstrap"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
)

// boot unpacks the bootstrap of an image of testdata.
func boot(tb testing.TB, name string) []byte {
	tb.Helper()
	packed, err := os.ReadFile(filepath.Join("testdata", name, "boot.tar.gz"))
	if err != nil {
		tb.Fatal(err)
	}
	b, err := unpackBootstrap(packed)
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

// buildAlone makes a layer of a bootstrap as if all its blobs were in the
// manifest, but none with chunk information.
func buildAlone(b []byte) (*index.Layer, error) {
	f, err := parse(b)
	if err != nil {
		return nil, err
	}
	desc := layer.Descriptor{Digest: digest.FromString("bootstrap"), Size: int64(len(b))}
	var layers []layer.Descriptor
	for _, blob := range f.blobs() {
		if d, err := blob.digest(); err == nil {
			layers = append(layers, layer.Descriptor{Digest: d, Size: 1 << 40})
		}
	}
	return build(f, desc, layers)
}

// patched is a copy of b with changes: each 8 bytes of patches are an offset and
// a value of 32 bits that is written there. Real bootstraps are large and mostly
// zeros, so that changing all of their bytes finds little.
func patched(b, patches []byte) []byte {
	b = bytes.Clone(b)
	for ; len(patches) >= 8 && len(b) >= 4; patches = patches[8:] {
		off := le.Uint32(patches) % uint32(len(b)-3)
		copy(b[off:], patches[4:8])
	}
	return b
}

// fuzzBootstrap checks that whatever a bootstrap says ends in a layer that is
// valid, or in an error that blames the image.
func fuzzBootstrap(f *testing.F, name string, at func(b []byte) []uint32) {
	seed := boot(f, name)
	f.Add([]byte{}, uint32(0))
	f.Add([]byte{}, uint32(len(seed)/2))
	for _, off := range at(seed) {
		for _, v := range []uint32{0, 1, 0xffff, 0x7fff_ffff, 0xffff_ffff} {
			f.Add(le.AppendUint32(le.AppendUint32(nil, off), v), uint32(0))
		}
	}
	f.Fuzz(func(t *testing.T, patches []byte, cut uint32) {
		b := patched(seed[:len(seed)-int(cut%uint32(len(seed)))], patches)
		l, err := buildAlone(b)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("error of another class: %v", err)
			}
			return
		}
		if err := l.Validate(); err != nil {
			t.Fatal(err)
		}
		if len(l.Table.Chunks) > len(b) || len(l.Entries) > len(b) {
			t.Fatalf("%d chunks and %d names of %d bytes", len(l.Table.Chunks), len(l.Entries), len(b))
		}
		if _, err := bootstrap.Build(l.Blob, []*index.Layer{l}); err != nil && !errdefs.IsInvalidArgument(err) {
			t.Fatal(err)
		}
	})
}

// words are the offsets of the 32-bit words from off on, n bytes.
func words(off uint64, n int) []uint32 {
	var out []uint32
	for i := 0; i < n; i += 4 {
		out = append(out, uint32(off)+uint32(i))
	}
	return out
}

// FuzzV5 begins with changes in the superblock and in every inode.
func FuzzV5(f *testing.F) {
	fuzzBootstrap(f, "v5-tiny", func(b []byte) []uint32 {
		at := words(0, 80)
		v, err := parseV5(b)
		if err != nil {
			f.Fatal(err)
		}
		for i := 0; i < len(v.inodes); i += 4 {
			at = append(at, words(uint64(le.Uint32(v.inodes[i:]))<<3, v5Inode)...)
		}
		return at
	})
}

// FuzzV6 begins with changes in the superblocks, the tables and the first inodes.
func FuzzV6(f *testing.F) {
	fuzzBootstrap(f, "v6-tiny", func(b []byte) []uint32 {
		v, err := parseV6(b)
		if err != nil {
			f.Fatal(err)
		}
		at := words(v6Super, v6SuperSize+60)
		at = append(at, words(le.Uint64(b[v6Super+v6SuperSize+8:]), v6BlobSize)...)
		at = append(at, words(le.Uint64(b[v6Super+v6SuperSize+24:]), recordSize)...)
		return append(at, words(v.meta+v.rootNid*v6Slot, 512)...)
	})
}

// metaOf returns the only packed blob of an image of testdata, with its plain
// chunk information and the header of that.
func metaOf(tb testing.TB, name, file string) (b *blob, plain, header []byte) {
	tb.Helper()
	f, err := parse(boot(tb, name))
	if err != nil {
		tb.Fatal(err)
	}
	b = f.blobs()[0]
	data, err := os.ReadFile(filepath.Join("testdata", name, file))
	if err != nil {
		tb.Fatal(err)
	}
	end := b.info.off + b.info.packed
	if plain, err = decompress(b.info.compressor, data[b.info.off:end], int64(b.info.plain)); err != nil {
		tb.Fatal(err)
	}
	return b, plain, data[end : end+headerSize]
}

// FuzzMeta reads chunk information and finds every chunk.
func FuzzMeta(f *testing.F) {
	var blobs []*blob
	var seeds [][]byte // plain, and the header
	for i, s := range []struct{ name, file string }{{"v6-zran", "0.blob"}, {"v6-batch-lz4-toc", "0.blob"}} {
		b, plain, header := metaOf(f, s.name, s.file)
		blobs, seeds = append(blobs, b), append(seeds, append(plain, header...))
		f.Add(uint8(i), []byte{})
		for _, off := range append(words(0, 48), words(uint64(len(plain)), 64)...) {
			f.Add(uint8(i), le.AppendUint32(le.AppendUint32(nil, off), 0x7fff_ffff))
		}
	}
	f.Fuzz(func(t *testing.T, i uint8, patches []byte) {
		b, all := *blobs[int(i)%len(blobs)], patched(seeds[int(i)%len(blobs)], patches)
		header := all[len(all)-headerSize:]
		b.info.chunks, b.info.off, b.info.packed = le.Uint32(header[12:]), le.Uint64(header[16:]), le.Uint64(header[24:])
		m, err := parseMeta(&b, all[:len(all)-headerSize], header)
		if err != nil {
			if !errdefs.IsInvalidArgument(err) {
				t.Fatalf("error of another class: %v", err)
			}
			return
		}
		for n := uint32(0); uint64(n)*entrySize < uint64(len(m.chunks)); n++ {
			e := m.chunks[n*entrySize:]
			p, err := m.piece(n, le.Uint64(e)>>32&0xff_ffff+1, index.ZstdFrame)
			if err != nil {
				continue
			}
			if p.Off < 0 || p.Len < 0 || p.Inner < 0 || p.Inner > maxShared {
				t.Fatalf("chunk %d: %+v", n, p)
			}
			if p.Codec == index.Deflate && m.points[p.Point].Bit/8 != p.Off {
				t.Fatalf("chunk %d: %+v is not at its checkpoint %+v", n, p, m.points[p.Point])
			}
		}
	})
}

// FuzzDecompress gives hostile bytes to every decompressor.
func FuzzDecompress(f *testing.F) {
	b, _, _ := metaOf(f, "v6-zran", "0.blob")
	data, err := os.ReadFile("testdata/v6-zran/0.blob")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(uint32(compressZstd), data[b.info.off:b.info.off+b.info.packed], uint32(b.info.plain))
	f.Add(uint32(compressLZ4), []byte("\x50hello"), uint32(5))
	f.Add(uint32(compressNone), []byte("hello"), uint32(5))
	f.Fuzz(func(t *testing.T, compressor uint32, packed []byte, size uint32) {
		size %= 1 << 20
		out, err := decompress(compressor, packed, int64(size))
		if err == nil && len(out) != int(size) {
			t.Fatalf("%d bytes, want %d", len(out), size)
		}
	})
}

// FuzzTOC looks for parts in hostile tables of contents.
func FuzzTOC(f *testing.F) {
	data, err := os.ReadFile("testdata/v6-zran/0.blob")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(data[len(data)-1152:], "blob.meta")
	f.Fuzz(func(t *testing.T, toc []byte, name string) {
		if sum, ok := findTOC(toc, name); ok && !bytes.Contains(toc, sum[:]) {
			t.Fatalf("%x is not in the table", sum)
		}
	})
}

// FuzzLayer unpacks hostile bootstrap layers.
func FuzzLayer(f *testing.F) {
	packed, err := os.ReadFile("testdata/v6-tiny/boot.tar.gz")
	if err != nil {
		f.Fatal(err)
	}
	f.Add(packed)
	f.Fuzz(func(t *testing.T, packed []byte) {
		b, err := unpackBootstrap(packed)
		if err == nil && int64(len(b)) > maxRatio*int64(len(packed))+slack {
			t.Fatalf("%d bytes from %d", len(b), len(packed))
		}
	})
}
