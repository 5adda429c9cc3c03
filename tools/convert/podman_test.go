package convert_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	splittar "github.com/vbatts/tar-split/archive/tar"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"

	"github.com/tatami-containers/tatami/tools/convert"
)

// podmanEntry is an entry of the TOC with the names that podman reads.
type podmanEntry struct {
	Type, Name, LinkName            string
	Mode, Size                      int64
	UID, GID                        int
	ModTime, AccessTime, ChangeTime *time.Time
	DevMajor, DevMinor              int64
	Xattrs                          map[string][]byte
	Digest                          string
	Offset, EndOffset               int64
	ChunkSize, ChunkOffset          int64
	ChunkDigest, ChunkType          string
	chunks                          []podmanEntry
}

type podmanTOC struct {
	Version        int
	Entries        []podmanEntry
	TarSplitDigest digest.Digest
}

// podmanBlob finds TOC and tar-split data by the annotations alone, as podman.
type podmanBlob struct {
	toc   podmanTOC
	end   int64 // of the members, bytes
	split []byte
}

func inflate(t *testing.T, b []byte, plain int64) []byte {
	t.Helper()
	z, err := zstd.NewReader(nil)
	must(err)
	defer z.Close()
	p, err := z.DecodeAll(b, nil)
	if err != nil || plain >= 0 && int64(len(p)) != plain {
		t.Fatalf("%d bytes, want %d, %v", len(p), plain, err)
	}
	return p
}

func openPodman(t *testing.T, r result) podmanBlob {
	t.Helper()
	const prefix = "io.github.containers.zstd-chunked."
	notes := r.Descriptor.Annotations
	var b podmanBlob
	var n, plain, typ int64
	if _, err := fmt.Sscanf(notes[prefix+"manifest-position"], "%d:%d:%d:%d", &b.end, &n, &plain, &typ); err != nil || typ != 1 {
		t.Fatal(err, notes)
	}
	toc := r.blob[b.end : b.end+n]
	if sum := digest.FromBytes(toc); sum.String() != notes[prefix+"manifest-checksum"] || r.TOC != sum {
		t.Errorf("TOC has digest %s, not %s", sum, notes[prefix+"manifest-checksum"])
	}
	if err := json.Unmarshal(inflate(t, toc, plain), &b.toc); err != nil || b.toc.Version != 1 {
		t.Fatal(err)
	}
	if pos, ok := notes[prefix+"tarsplit-position"]; ok {
		var at int64
		if _, err := fmt.Sscanf(pos, "%d:%d:%d", &at, &n, &plain); err != nil {
			t.Fatal(err)
		}
		if sum := digest.FromBytes(r.blob[at : at+n]); sum != b.toc.TarSplitDigest {
			t.Errorf("tar-split data has digest %s, not %s", sum, b.toc.TarSplitDigest)
		}
		b.split = inflate(t, r.blob[at:at+n], plain)
	}
	return b
}

// files merges chunks into their files and works out where they end: the
// members of a file come one behind the other.
func (b *podmanBlob) files() []podmanEntry {
	var list []podmanEntry
	for _, e := range b.toc.Entries {
		if e.Type != "chunk" {
			list = append(list, e)
		}
		last := &list[len(list)-1]
		last.chunks = append(last.chunks, e)
	}
	for i := range list {
		e := &list[i]
		for j := range e.chunks {
			e.chunks[j].EndOffset = e.EndOffset
			if j > 0 {
				e.chunks[j-1].EndOffset = e.chunks[j].Offset
			}
		}
	}
	return list
}

// TestPodman reads zstd:chunked as podman does: files from the TOC, chunk by
// chunk, and the tar from tar-split data and files.
func TestPodman(t *testing.T) {
	for name, opts := range map[string]convert.Options{"default": {}, "small": {ChunkSize: 40_000, Level: 1}} {
		t.Run(name, func(t *testing.T) {
			opts.Format = convert.ZstdChunked
			r := layer(t, base(), opts)
			b := openPodman(t, r)
			files := storage.NewBufferFileGetPutter()
			empty, i := 0, 0
			list := b.files()
			walk(base(), func(h *tar.Header, data []byte) {
				empty += checkPodman(t, r.blob, list[i], h, data)
				_, _, err := files.Put(h.Name, bytes.NewReader(data))
				must(err)
				i++
			})
			if i != len(list) {
				t.Errorf("%d files, want %d", len(list), i)
			}
			if empty < 4<<20 {
				t.Errorf("only %d bytes are in chunks of zeros", empty)
			}
			checkSplit(t, b.split, list, files)
		})
	}
}

// checkPodman compares one file, and returns how much of it need not be fetched.
func checkPodman(t *testing.T, blob []byte, e podmanEntry, h *tar.Header, data []byte) (empty int) {
	t.Helper()
	if e.Name != h.Name || e.LinkName != h.Linkname || e.Mode != h.Mode || e.Size != h.Size || e.UID != h.Uid || e.GID != h.Gid ||
		!e.ModTime.Equal(h.ModTime) || e.DevMajor != h.Devmajor || e.DevMinor != h.Devminor {
		t.Errorf("%s is %+v, want %+v", h.Name, e, h)
	}
	if len(data) == 0 {
		return 0
	}
	if e.Digest != digest.FromBytes(data).String() {
		t.Errorf("%s has digest %s", h.Name, e.Digest)
	}
	off := int64(0)
	for _, c := range e.chunks {
		n := c.ChunkSize
		if n == 0 {
			n = e.Size
		}
		want := data[off : off+n]
		if len(e.chunks) > 1 && (c.ChunkOffset != off || c.ChunkDigest != digest.FromBytes(want).String()) {
			t.Errorf("%s: chunk at %d is %+v", h.Name, off, c)
		}
		if got := inflate(t, blob[c.Offset:c.EndOffset], -1); !bytes.HasPrefix(got, want) {
			t.Errorf("%s: chunk at %d is not in its frame", h.Name, off)
		}
		if c.ChunkType == "zeros" {
			empty += int(n)
			if len(bytes.TrimLeft(want, "\x00")) > 0 {
				t.Errorf("%s: chunk at %d is not zeros", h.Name, off)
			}
		}
		off += n
	}
	if off != e.Size {
		t.Errorf("%s: chunks cover %d of %d bytes", h.Name, off, e.Size)
	}
	return empty
}

// checkSplit makes the tar again with tar-split, and compares headers with the
// TOC as podman does before it trusts them.
func checkSplit(t *testing.T, split []byte, list []podmanEntry, files storage.FileGetter) {
	t.Helper()
	var again bytes.Buffer
	stream := asm.NewOutputTarStream(files, storage.NewJSONUnpacker(bytes.NewReader(split)))
	if _, err := io.Copy(&again, stream); err != nil || !bytes.Equal(again.Bytes(), base()) {
		t.Errorf("tar-split makes another tar, %v", err)
	}
	i := 0
	err := asm.IterateHeaders(storage.NewJSONUnpacker(bytes.NewReader(split)), func(h *splittar.Header) error {
		e := list[i]
		i++
		if e.Name != h.Name || e.Mode != h.Mode || e.Size != h.Size || !e.ModTime.Equal(h.ModTime) {
			return fmt.Errorf("header of %s for %s", h.Name, e.Name)
		}
		return nil
	})
	if err != nil || i != len(list) {
		t.Errorf("%d of %d headers, %v", i, len(list), err)
	}
}

// TestContentDefined holds that a change in a file leaves most chunks as they
// were.
func TestContentDefined(t *testing.T) {
	sums := func(data []byte) map[string]bool {
		m := map[string]bool{}
		r := layer(t, oneFile("f", data), convert.Options{Format: convert.ZstdChunked, ChunkSize: 64 << 10})
		for _, e := range openPodman(t, r).toc.Entries {
			if m[e.ChunkDigest] = true; e.ChunkSize > 64<<10 {
				t.Errorf("chunk of %d bytes", e.ChunkSize)
			}
		}
		return m
	}
	data := text(9, 4<<20)
	before := sums(data)
	after := sums(append([]byte("new words at the front"), data...))
	same := 0
	for s := range after {
		if before[s] {
			same++
		}
	}
	if len(before) < 100 || len(before)-same > 5 {
		t.Errorf("%d chunks of %d are the same", same, len(before))
	}
}

func oneFile(name string, data []byte) []byte {
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	must(w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(len(data))}))
	_, err := w.Write(data)
	must(err)
	must(w.Close())
	return b.Bytes()
}
