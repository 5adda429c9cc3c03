package soci

import (
	"bytes"
	"encoding/binary"
	"errors"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
)

// Parts of a ztoc that ztocOf made.

func info(n node) node     { return n[ztocInfo].(node) }
func points(n node) []byte { return info(n)[infoCheckpoints].([]byte) }
func digests(n node) []any { return info(n)[infoSpanDigests].([]any) }
func files(n node) []any   { return n[ztocTOC].(node)[tocMetadata].([]any) }

// file returns the entry of a name.
func file(n node, name string) node {
	for _, f := range files(n) {
		if f.(node)[fileName] == name {
			return f.(node)
		}
	}
	return nil
}

// clone copies a node, so that a test can change it.
func clone(v any) any {
	switch v := v.(type) {
	case node:
		return node(clone([]any(v)).([]any))
	case []any:
		list := make([]any, len(v))
		for i, e := range v {
			list[i] = clone(e)
		}
		return list
	case []byte:
		return bytes.Clone(v)
	}
	return v
}

// setPoint changes a 64-bit field of a checkpoint: 0 is its offset in the blob,
// 8 the plain one.
func setPoint(n node, i, field int, v int64) {
	binary.LittleEndian.PutUint64(points(n)[pointsHeader+i*pointSize+field:], uint64(v))
}

// TestHostile opens ztocs that contradict themselves or the layer.
func TestHostile(t *testing.T) {
	plain := sample(t, 60)
	zipped := packed(t, plain)
	plainZtoc, zippedZtoc := ztocOf(t, plain, options{span: 50_000}), ztocOf(t, zipped, options{span: 64 << 10})
	for _, b := range []struct {
		blob
		node
	}{{plain, plainZtoc}, {zipped, zippedZtoc}} {
		if _, err := openNode(b.blob, b.node); err != nil {
			t.Fatalf("before any change: %v", err)
		}
	}
	large := func(n node) node { return file(n, "etc/large") }
	cases := []struct {
		name   string
		tar    bool
		change func(n node)
		want   string
	}{
		{"version", false, func(n node) { n[0] = "1.0" }, `version "1.0"`},
		{"no version", false, func(n node) { n[0] = nil }, `version ""`},
		{"blob size", false, func(n node) { n[ztocCompressed] = int64(5) }, "for a blob of 5 bytes"},
		{"too large to inflate to", false, func(n node) { n[ztocUncompressed] = zipped.Size() * 1100 }, "cannot inflate"},
		{"negative size", false, func(n node) { n[ztocUncompressed] = int64(-1) }, "uncompressed size"},
		{"far behind the last point", false, func(n node) {
			n[ztocUncompressed] = int64(maxPlain) + 2<<20
		}, "behind the last checkpoint"},
		{"algorithm", false, func(n node) { info(n)[infoAlgorithm] = byte(3) }, "algorithm 3"},
		{"no info", false, func(n node) { n[ztocInfo] = nil }, "no checkpoints"},
		{"number of points", false, func(n node) { points(n)[0]++; points(n)[0]++ }, "checkpoints in"},
		{"negative number of points", false, func(n node) { points(n)[3] = 0x80 }, "checkpoints in"},
		{"no points", false, func(n node) { info(n)[infoCheckpoints] = make([]byte, pointsHeader) }, "no checkpoint at the start"},
		{"short points", false, func(n node) { info(n)[infoCheckpoints] = points(n)[:5] }, "no checkpoints"},
		{"first point", false, func(n node) { setPoint(n, 0, 8, 1) }, "no checkpoint at the start"},
		{"point at byte 0", false, func(n node) { setPoint(n, 0, 0, 0) }, "checkpoint 0"},
		{"point behind the blob", false, func(n node) { setPoint(n, 2, 0, zipped.Size()+1) }, "checkpoint 2"},
		{"point at a negative byte", false, func(n node) { setPoint(n, 2, 0, -5) }, "checkpoint 2"},
		{"bits", false, func(n node) { points(n)[pointsHeader+pointSize+16] = 8 }, "8 bits before"},
		{"points back", false, func(n node) { setPoint(n, 2, 0, 20) }, "checkpoint 2"},
		{"points back in the stream", false, func(n node) { setPoint(n, 2, 8, 20) }, "checkpoint 2"},
		{"negative plain offset", false, func(n node) { setPoint(n, 2, 8, -1) }, "cannot inflate"},
		{"digests", false, func(n node) { info(n)[infoSpanDigests] = digests(n)[1:] }, "digests for"},
		{"last span", false, func(n node) { info(n)[infoMaxSpan] = int32(1) }, "the last of which has number 1"},
		{"digest", false, func(n node) { digests(n)[1] = "sha512:00" }, "span 1: digest"},
		{"digest that is no number", false, func(n node) { digests(n)[1] = "sha256:" + strings.Repeat("z", 64) }, "span 1"},
		{"file behind the tar", false, func(n node) { large(n)[fileSize] = n[ztocUncompressed] }, "etc/large"},
		{"negative size of a file", false, func(n node) { large(n)[fileSize] = int64(-1) }, "etc/large"},
		{"largest size", false, func(n node) { large(n)[fileSize] = int64(1<<63 - 1) }, "etc/large"},
		{"files overlap", false, func(n node) { large(n)[fileSize] = large(n)[fileSize].(int64) + 4096 }, "where the entry before ends"},
		{"order of files", false, func(n node) { slices.Reverse(files(n)) }, "where the entry before ends"},
		{"type", false, func(n node) { large(n)[fileType] = "sparse" }, "unknown type"},
		{"name", false, func(n node) { large(n)[fileName] = "../x" }, "leads out of the layer"},
		{"no name", false, func(n node) { large(n)[fileName] = nil }, "empty name"},
		{"long name", false, func(n node) { large(n)[fileName] = strings.Repeat("x", 256) }, "clean and relative"},
		{"owner", false, func(n node) { large(n)[fileUID] = uint32(1<<32 - 1) }, "owner"},
		{"time", false, func(n node) { large(n)[fileModTime] = "yesterday" }, "modification time"},
		{"link to itself", false, func(n node) { file(n, "etc/hard")[fileLink] = "etc/hard" }, "hard link to"},
		{"link of aufs", false, func(n node) { file(n, "etc/hard")[fileLink] = ".wh..wh.plnk/1.2" }, "hard link to"},
		{"device", false, func(n node) { file(n, "null")[fileDevMajor] = int64(-1) }, "device number"},
		{"sparse", false, func(n node) { large(n)[fileRecords] = []any{node{"GNU.sparse.major", "1"}} }, "sparse files"},
		{"attribute", false, func(n node) {
			large(n)[fileRecords] = []any{node{"SCHILY.xattr.user.x", strings.Repeat("x", 70000)}}
		}, "is over 65536"},
		{"tar: span", true, func(n node) { info(n)[infoCheckpoints] = write(node{nil, int64(0), int64(len(plain))}) }, "spans of 0"},
		{"tar: size", true, func(n node) { info(n)[infoCheckpoints] = write(node{nil, int64(50_000), int64(5)}) }, "in a tar of 5"},
		{"tar: number", true, func(n node) { info(n)[infoCheckpoints] = write(node{nil, int64(1), int64(len(plain))}) }, "digests for"},
		{"tar: rubbish", true, func(n node) { info(n)[infoCheckpoints] = []byte("rubbish!") }, "spans:"},
		{"tar: stream", true, func(n node) { n[ztocUncompressed] = int64(len(plain) + 1) }, "plain tar of"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b, n := blob(plain), clone(plainZtoc).(node)
			if !c.tar {
				b, n = zipped, clone(zippedZtoc).(node)
			}
			c.change(n)
			l, err := openNode(b, n)
			if l != nil || !errdefs.IsInvalidArgument(err) {
				t.Fatalf("accepted: %t, error %v", l != nil, err)
			}
			if text := err.Error(); !strings.Contains(text, c.want) || !strings.Contains(text, b.desc().Digest.String()) {
				t.Errorf("error %q, want %q and the layer", text, c.want)
			}
		})
	}
}

// TestShared has lists with the same element many times, by which a short ztoc
// would tell of a layer that fills the memory.
func TestShared(t *testing.T) {
	b := packed(t, make([]byte, 1024))
	record := node{"SCHILY.xattr.user.x", strings.Repeat("x", 50_000)}
	dir := func(records any) node {
		return node{"d", "dir", int64(512), nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, records}
	}
	cases := []struct {
		name  string
		files any
		fail  bool
	}{
		{"one", []any{dir([]any{record})}, false},
		{"entries", repeated{dir(nil), 100_000}, true},
		{"entries with an attribute", repeated{dir([]any{record}), 1000}, true},
		{"records", []any{dir(repeated{record, 1000})}, true},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			n := ztocOf(t, b, options{span: 1 << 20})
			n[ztocTOC] = node{c.files}
			_, err := openNode(b, n)
			if !c.fail && err != nil || c.fail && !errors.Is(err, errSharing) {
				t.Error(err)
			}
		})
	}
}

// TestLongSpan has a span that is too long to be checked in memory.
func TestLongSpan(t *testing.T) {
	const size = maxSpan + 1
	sums := []any{"sha256:" + strings.Repeat("0", 64)}
	z := write(node{"0.9", "", int64(size), int64(0), node{[]any{}}, node{byte(2), int32(0), sums, write(node{nil, int64(size), int64(size)})}})
	_, err := Open(z, digest.FromBytes(z), layer.Descriptor{Digest: digest.FromString("layer"), Size: size})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "smaller --span-size") {
		t.Error(err)
	}
}

// TestDescriptor opens good ztocs for layers that cannot have them.
func TestDescriptor(t *testing.T) {
	b := packed(t, sample(t, 60))
	z := write(ztocOf(t, b, options{span: 64 << 10}))
	for _, mediaType := range []string{"application/vnd.oci.image.layer.v1.tar+zstd", "text/plain"} {
		desc := b.desc()
		desc.MediaType = mediaType
		if _, err := Open(z, digest.FromBytes(z), desc); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", mediaType, err)
		}
	}
	if _, err := Open(z, "sha256:1", b.desc()); !errdefs.IsInvalidArgument(err) {
		t.Errorf("digest: %v", err)
	}
	desc := b.desc()
	desc.Digest = "x"
	if _, err := Open(z, digest.FromBytes(z), desc); !errdefs.IsInvalidArgument(err) {
		t.Errorf("digest of the layer: %v", err)
	}
}

// FuzzOpen opens anything. What is accepted must be a valid layer, and no
// larger than what describes it allows.
func FuzzOpen(f *testing.F) {
	// Only short ones: a window is 32 KiB in which no bit means anything.
	img := loadReal(f)
	for of, z := range img.ztocs(f) {
		if len(img.blobs[z]) < index.MaxWindow {
			f.Add(img.blobs[z], int64(len(img.blobs[of])))
		}
	}
	plain := sample(f, 1)
	for _, b := range []blob{packed(f, plain), plain, packed(f, make([]byte, 1024))} {
		f.Add(write(ztocOf(f, b, options{span: 1 << 30, v1: true})), b.Size())
	}
	f.Add([]byte{}, int64(0))
	f.Fuzz(func(t *testing.T, z []byte, size int64) {
		l, err := Open(z, digest.FromBytes(z), layer.Descriptor{Digest: digest.FromString("layer"), Size: size})
		if err != nil {
			if l != nil || !errdefs.IsInvalidArgument(err) {
				t.Fatalf("accepted: %t, error %v", l != nil, err)
			}
			return
		}
		if err := l.Validate(); err != nil {
			t.Fatal(err)
		}
		if n := len(l.Entries); n > maxSharing*len(z)/tableCost || len(l.Table.Chunks) > maxData/index.UnitSize+n {
			t.Fatalf("%d bytes make %d entries and %d chunks", len(z), n, len(l.Table.Chunks))
		}
	})
}
