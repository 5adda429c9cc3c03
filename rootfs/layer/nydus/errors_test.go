package nydus

import (
	"archive/tar"
	"bytes"
	stdgzip "compress/gzip"
	"context"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
)

// lookup finds the number of the inode of a path.
func lookup(t *testing.T, f format, path string) uint64 {
	t.Helper()
	number := f.root()
	for _, want := range strings.Split(path, "/") {
		d, err := f.inode(number)
		if err != nil {
			t.Fatal(err)
		}
		list, err := f.list(d)
		if err != nil {
			t.Fatal(err)
		}
		for {
			name, n, ok, err := list.next()
			if err != nil || !ok {
				t.Fatalf("no %s in %s: %v", want, path, err)
			}
			if name == want {
				number = n
				break
			}
		}
	}
	return number
}

// v6At is where parts of the bootstrap of v6-tiny are, in bytes: chunk is the
// record of the first chunk of d/file.
type v6At struct{ ext, blob, chunk, root, file int }

func findV6(t *testing.T, b []byte) v6At {
	t.Helper()
	v, err := parseV6(b)
	if err != nil {
		t.Fatal(err)
	}
	ext := v6Super + v6SuperSize
	inode := func(n uint64) int { return int(v.meta + n*v6Slot) }
	at := v6At{ext: ext, blob: int(le.Uint64(b[ext+8:])), root: inode(v.rootNid), file: inode(lookup(t, v, "d/file"))}
	r, err := v.record(b[at.indexes(b):])
	if err != nil {
		t.Fatal(err)
	}
	at.chunk = int(le.Uint64(b[ext+24:])) + int(v.records[chunkKey(r.blob, r.number)])*recordSize
	return at
}

// indexes is where the chunks of d/file are listed, which has extended
// attributes.
func (a v6At) indexes(b []byte) int {
	size := v6Compact + int(le.Uint16(b[a.file:])&1)*v6Compact
	return (a.file + size + v6XattrHeader + (int(le.Uint16(b[a.file+2:]))-1)*4 + 7) &^ 7
}

func put32(off int, v uint32) func([]byte) { return func(b []byte) { le.PutUint32(b[off:], v) } }
func or32(off int, v uint32) func([]byte) {
	return func(b []byte) { le.PutUint32(b[off:], le.Uint32(b[off:])|v) }
}

func TestV6Errors(t *testing.T) {
	good := boot(t, "v6-tiny")
	at := findV6(t, good)
	cases := []struct {
		name   string
		change func([]byte)
		says   string
	}{
		{"magic", put32(v6Super, 0), "neither RAFS v5 nor v6"},
		{"plain EROFS", put32(v6Super+8, 0), "not RAFS"},
		{"incompatible", or32(v6Super+80, 0x40), "newer version"},
		{"shared attributes", put32(v6Super+44, 1), "shared"},
		{"tarfs blocks", func(b []byte) { b[v6Super+12] = 9 }, "tarfs"},
		{"blocks", func(b []byte) { b[v6Super+12] = 13 }, "13 bits"},
		{"unknown flag", or32(at.ext+4, 1), "newer version"},
		{"tarfs flag", or32(at.ext, flagTarfs), "tarfs"},
		{"encrypted flag", or32(at.ext, flagEncrypted), "convert the image without encryption"},
		{"two algorithms", or32(at.ext, flagSHA256|flagBLAKE3), "two digest algorithms"},
		{"chunk size", put32(at.ext+20, 32<<20), "power of two"},
		{"blob table", put32(at.ext+16, 100), "no table"},
		{"blob table outside", put32(at.ext+8, 1<<30), "not within"},
		{"chunk table", put32(at.ext+32, 81), "no table"},
		{"chunk table outside", put32(at.ext+28, 1), "not within"},
		{"blob cipher", put32(at.blob+216, 1), "is encrypted"},
		{"blob encrypted", or32(at.blob+84, featureEncrypted), "is encrypted"},
		{"blob tarfs", or32(at.blob+84, featureTarfs), "tarfs"},
		{"blob external", or32(at.blob+84, featureExternal), "outside the registry"},
		{"blob feature", or32(at.blob+84, 0x1_0000), "unknown features 0x10000"},
		{"blob batches of version 1", or32(at.blob+84, featureBatch), "version 2"},
		{"blob compressor", put32(at.blob+76, 9), "unknown compressor 9"},
		{"blob digests", put32(at.blob+80, 1), "digests of algorithm 1"},
		{"blob id", put32(at.blob, 0), "not a SHA-256 digest"},
		{"chunk flags", or32(at.chunk+36, 0x100), "unknown flags 0x100"},
		{"chunk encrypted", or32(at.chunk+36, chunkEncrypted), "is encrypted"},
		{"chunk stored", put32(at.chunk+40, 7), "takes 7 bytes uncompressed"},
		{"chunk length", func(b []byte) { put32(at.chunk+40, 7)(b); put32(at.chunk+44, 7)(b) }, "reach to 7"},
		{"chunk number", put32(at.chunk+72, 77), "not in the table of chunks"},
		{"root number", func(b []byte) { le.PutUint16(b[v6Super+14:], 0xffff) }, "root"},
		{"root is a file", func(b []byte) { b[at.root+5] = 0x80 }, "layout"},
		{"type", func(b []byte) { b[at.file+5] = 0 }, "unknown type"},
		{"format", func(b []byte) { b[at.file+1] = 1 }, "unknown bits"},
		{"layout", func(b []byte) { b[at.file] &^= 0xe }, "layout 0"},
		{"compressed EROFS", func(b []byte) { b[at.file] = b[at.file]&^0xe | 2 }, "layout 1"},
		{"file size", func(b []byte) { le.PutUint64(b[at.file+8:], 1<<62) }, "bytes"},
		{"attributes", func(b []byte) { le.PutUint16(b[at.file+2:], 0xffff) }, "not within"},
		{"attributes shared", func(b []byte) { b[at.file+v6Extended+4] = 1; b[at.file+v6Compact+4] = 1 }, "extended attribute"},
		{"chunk format", put32(at.file+16, 0x80), "format 0x80"},
		{"chunk blob", func(b []byte) { b[at.indexes(b)+2] = 0 }, "in no blob"},
		{"cycle", func(b []byte) { off, _ := entry(t, b, "d"); le.PutUint64(b[off:], uint64(le.Uint16(b[v6Super+14:]))) }, "two places"},
		{"order", func(b []byte) { _, text := entry(t, b, "null"); b[text] = 'a' }, "not in order"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b := bytes.Clone(good)
			c.change(b)
			_, err := buildAlone(b)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
		})
	}
	for cut := 0; cut < len(good); cut += 61 {
		if _, err := buildAlone(good[:cut]); err != nil && !errdefs.IsInvalidArgument(err) {
			t.Fatalf("cut at %d: %v", cut, err)
		}
	}
}

// entries is where the entries of the root's directory begin.
func entries(t *testing.T, b []byte) int {
	t.Helper()
	v, err := parseV6(b)
	if err != nil {
		t.Fatal(err)
	}
	d, err := v.inode(v.rootNid)
	if err != nil {
		t.Fatal(err)
	}
	block, err := v.block(d, 0)
	if err != nil {
		t.Fatal(err)
	}
	return len(b) - cap(block)
}

// entry is where a name in the root has its entry and where the name is.
func entry(t *testing.T, b []byte, name string) (off, text int) {
	t.Helper()
	block := entries(t, b)
	for i := block; i < block+int(le.Uint16(b[block+8:])); i += v6Dirent {
		if text := block + int(le.Uint16(b[i+8:])); string(b[text:][:len(name)]) == name {
			return i, text
		}
	}
	t.Fatalf("no %s", name)
	return 0, 0
}

// TestV6HandMade has what no version of nydus-image that was tried writes.
func TestV6HandMade(t *testing.T) {
	good := boot(t, "v6-tiny")
	at := findV6(t, good)
	plain, err := buildAlone(good)
	if err != nil {
		t.Fatal(err)
	}
	file := func(t *testing.T, l *index.Layer) *index.Entry {
		t.Helper()
		for i := range l.Entries {
			if l.Entries[i].Path == "d/file" {
				return &l.Entries[i]
			}
		}
		t.Fatal("no d/file")
		return nil
	}
	change := func(t *testing.T, change func([]byte)) *index.Layer {
		t.Helper()
		b := bytes.Clone(good)
		change(b)
		l, err := buildAlone(b)
		if err != nil {
			t.Fatal(err)
		}
		return l
	}
	t.Run("hole", func(t *testing.T) {
		l := change(t, put32(at.indexes(good)+4, v6NullBlock))
		if len(l.Table.Chunks) != len(plain.Table.Chunks)-1 || l.Table.Size != plain.Table.Size || l.Table.Chunks[0] != plain.Table.Chunks[1] {
			t.Errorf("%d chunks of %d", len(l.Table.Chunks), len(plain.Table.Chunks))
		}
	})
	t.Run("hole by its record", func(t *testing.T) {
		if l := change(t, or32(at.chunk+36, chunkHole)); len(l.Table.Chunks) != len(plain.Table.Chunks)-1 {
			t.Errorf("%d chunks of %d", len(l.Table.Chunks), len(plain.Table.Chunks))
		}
	})
	t.Run("gzip", func(t *testing.T) {
		l := change(t, func(b []byte) { or32(at.chunk+36, chunkCompressed)(b); put32(at.blob+76, compressGzip)(b) })
		n := 0
		for _, p := range l.Access.Pieces {
			if p.Codec == index.GzipMember {
				n++
			}
		}
		if n != 1 {
			t.Errorf("%d gzip members", n)
		}
	})
	t.Run("owners", func(t *testing.T) {
		owned := func(b []byte) {
			uid := at.file + 24
			b[uid] = 9
		}
		if e := file(t, change(t, owned)); e.UID != 9 {
			t.Errorf("uid %d", e.UID)
		}
		without := func(b []byte) { owned(b); b[at.ext] &^= flagOwners }
		if e := file(t, change(t, without)); e.UID != 0 {
			t.Errorf("uid %d without owners", e.UID)
		}
	})
	t.Run("socket", func(t *testing.T) {
		l := change(t, func(b []byte) { b[at.file+5] = 0xc0 | b[at.file+5]&0x0f })
		for _, e := range l.Entries {
			if e.Path == "d/file" {
				t.Errorf("%+v", e)
			}
		}
	})
}

func TestV5Errors(t *testing.T) {
	good := boot(t, "v5-tiny")
	v, err := parseV5(good)
	if err != nil {
		t.Fatal(err)
	}
	inode := func(n uint64) int { return int(le.Uint32(v.inodes[(n-1)*4:])) << 3 }
	root, file := inode(1), inode(lookup(t, v, "d/file"))
	f, err := v.inode(lookup(t, v, "d/file"))
	if err != nil {
		t.Fatal(err)
	}
	chunk := file + int(f.body)
	cases := []struct {
		name   string
		change func([]byte)
		says   string
	}{
		{"version", put32(4, 0x600), "version 0x600"},
		{"chunk size", put32(12, 5000), "power of two"},
		{"flags", or32(16, 0x8000), "unknown flags"},
		{"encrypted", or32(16, flagEncrypted), "encrypted"},
		{"inode table", put32(32, 1<<30), "inode table"},
		{"inodes", put32(56, 1<<30), "inode table"},
		{"prefetch", put32(60, 1<<30), "prefetch table"},
		{"blob table", put32(64, 1<<30), "blob table"},
		{"blob features", put32(72, 1<<30), "blob table"},
		{"batches", put32(int(le.Uint64(good[72:]))+4, featureBatch|featureChunkInfoV2), "v5 does not have"},
		{"cycle", put32(root+92, 1), "two places"},
		{"children", put32(root+96, 1<<30), "inode 8 of"},
		{"inode flags", or32(file+80, 0x10), "unknown flags"},
		{"size", put32(file+64, 5001), "cover 5000 of 5001"},
		{"size less", put32(file+64, 4999), "in a file of 4999"},
		{"chunks", put32(file+96, 1<<30), "chunks"},
		{"chunk blob", put32(chunk+32, 7), "blob 7 of 1"},
		{"chunk gap", put32(chunk+64, 1), "reach to 0"},
		{"chunk order", put32(chunk+recordSize+64, 5), "reach to 4096"},
		{"name", func(b []byte) { le.PutUint16(b[file+100:], 0xffff) }, ""},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b := bytes.Clone(good)
			c.change(b)
			_, err := buildAlone(b)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
		})
	}
	holes := bytes.Clone(good)
	or32(file+80, v5Hole)(holes)
	or32(chunk+36, chunkHole)(holes)
	le.PutUint64(holes[file+64:], 9000)
	if l, err := buildAlone(holes); err != nil || len(l.Table.Chunks) != 2 || l.Table.Size != index.RoundUp(9000)+index.BlockSize {
		t.Errorf("holes: %v", err)
	}
}

// blobBytes is a blob in memory.
type blobBytes []byte

func (b blobBytes) Size() int64 { return int64(len(b)) }

func (b blobBytes) ReadRange(_ context.Context, off, n int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(b[off : off+n])), nil
}

// opener opens an image of a bootstrap layer and one data layer, whose bytes
// can differ from what their digests say.
type opener struct {
	boot, data         []byte
	bootDesc, dataDesc layer.Descriptor
}

func newOpener(t *testing.T, name, file string) *opener {
	t.Helper()
	var o opener
	for _, x := range []struct {
		file, annotation string
		b                *[]byte
		desc             *layer.Descriptor
	}{{"boot.tar.gz", BootstrapAnnotation, &o.boot, &o.bootDesc}, {file, BlobAnnotation, &o.data, &o.dataDesc}} {
		b, err := os.ReadFile(filepath.Join("testdata", name, x.file))
		if err != nil {
			t.Fatal(err)
		}
		*x.b = b
		*x.desc = layer.Descriptor{Digest: digest.FromBytes(b), Size: int64(len(b)), Annotations: map[string]string{x.annotation: "true"}}
	}
	return &o
}

// setBoot replaces the bootstrap layer.
func (o *opener) setBoot(b []byte) {
	o.boot, o.bootDesc.Digest, o.bootDesc.Size = b, digest.FromBytes(b), int64(len(b))
}

func (o *opener) open(t *testing.T) (*index.Layer, error) {
	return Open(t.Context(), []layer.Descriptor{o.dataDesc, o.bootDesc}, func(d layer.Descriptor) layer.Blob {
		if d.Digest == o.bootDesc.Digest {
			return blobBytes(o.boot)
		}
		return blobBytes(o.data)
	})
}

// tarGz is a gzipped tar with one file.
func tarGz(t *testing.T, name string, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	z := stdgzip.NewWriter(&out)
	w := tar.NewWriter(z)
	if err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(b)), Typeflag: tar.TypeReg}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func TestOpenErrors(t *testing.T) {
	zranInfo, _, _ := metaOf(t, "v6-zran", "0.blob")
	cases := []struct {
		name   string
		change func(*opener)
		is     func(error) bool
		says   string
	}{
		{"no bootstrap", func(o *opener) { o.bootDesc.Annotations = nil }, errdefs.IsInvalidArgument, "no layer"},
		{"other bootstrap", func(o *opener) { o.boot[20] ^= 1 }, errdefs.IsDataLoss, "digest"},
		{"large bootstrap", func(o *opener) { o.bootDesc.Size = maxPacked + 1 }, errdefs.IsInvalidArgument, "is over"},
		{"no digest", func(o *opener) { o.bootDesc.Digest = "x" }, errdefs.IsInvalidArgument, "digest"},
		{"no tar", func(o *opener) { o.setBoot([]byte("no tar at all")) }, errdefs.IsInvalidArgument, "unpack"},
		{"other file", func(o *opener) { o.setBoot(tarGz(t, "image/x", nil)) }, errdefs.IsInvalidArgument, "no file image/image.boot"},
		{"bomb", func(o *opener) { o.setBoot(tarGz(t, "image/image.boot", make([]byte, 20<<20))) }, errdefs.IsInvalidArgument, "is over"},
		{"bomb before", func(o *opener) { o.setBoot(tarGz(t, "x", make([]byte, 20<<20))) }, errdefs.IsInvalidArgument, ""},
		{"encrypted", func(o *opener) { o.dataDesc.Annotations[encryptedAnnotation] = "true" }, errdefs.IsInvalidArgument, "without encryption"},
		{"blob is missing", func(o *opener) { o.dataDesc.Digest = digest.FromString("other") }, errdefs.IsInvalidArgument, "not a layer of the manifest"},
		{"blob is short", func(o *opener) { o.data = o.data[:5000] }, errdefs.IsInvalidArgument, "not within a blob of 5000"},
		{"chunk information", func(o *opener) { o.data[zranInfo.info.off+zranInfo.info.packed/2] ^= 1 }, errdefs.IsDataLoss, "blob "},
		{"header", func(o *opener) { o.data[zranInfo.info.off+zranInfo.info.packed+200] ^= 1 }, errdefs.IsDataLoss, "blob.meta.header"},
		{"table of contents", func(o *opener) { o.data[len(o.data)-600] ^= 1 }, errdefs.IsDataLoss, "table of contents"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			o := newOpener(t, "v6-zran", "0.blob")
			if _, err := o.open(t); err != nil {
				t.Fatal(err)
			}
			c.change(o)
			_, err := o.open(t)
			if err == nil || !c.is(err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
		})
	}
}

func TestDetect(t *testing.T) {
	with := func(annotation string) layer.Descriptor {
		return layer.Descriptor{Digest: digest.FromString(annotation), Annotations: map[string]string{annotation: "true"}}
	}
	media := layer.Descriptor{Digest: digest.FromString("m"), MediaType: BlobMediaType}
	layers := []layer.Descriptor{with(BlobAnnotation), {Digest: digest.FromString("plain")}, media, with(BootstrapAnnotation)}
	boot, blobs, ok := Detect(layers)
	if !ok || boot.Digest != layers[3].Digest || len(blobs) != 2 || blobs[1].Digest != media.Digest {
		t.Errorf("%v, %v, %v", boot, blobs, ok)
	}
	if _, _, ok := Detect(layers[:3]); ok {
		t.Error("a Nydus image without a bootstrap")
	}
}
