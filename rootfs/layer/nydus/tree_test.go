package nydus_test

import (
	"archive/tar"
	"bytes"
	stdgzip "compress/gzip"
	"errors"
	"fmt"
	"io"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// text is n bytes that compress somewhat.
func text(seed uint64, n int) []byte {
	rnd := rand.New(rand.NewPCG(seed, 1))
	var b []byte
	for len(b) < n {
		b = fmt.Appendf(b, "%d %x\n", len(b), rnd.Uint32N(1<<16))
	}
	return b[:n]
}

// noise is n bytes that do not compress.
func noise(seed uint64, n int) []byte {
	rnd := rand.New(rand.NewPCG(seed, 2))
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(rnd.Uint32())
	}
	return b
}

// tarFile is a file of a tar; data only of regular ones.
type tarFile struct {
	tar.Header
	data []byte
}

func regular(name string, data []byte) tarFile {
	return tarFile{tar.Header{Name: name, Typeflag: tar.TypeReg, Mode: 0o644}, data}
}

func directory(name string, mode int64) tarFile {
	return tarFile{tar.Header{Name: name, Typeflag: tar.TypeDir, Mode: mode}, nil}
}

// tree has everything that an image can have.
func tree() []tarFile {
	capability := "\x01\x00\x00\x02\x00\x20\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
	small, owned := regular("etc/small", []byte("small\n")), regular("etc/owned", text(1, 100))
	small.PAXRecords = map[string]string{"SCHILY.xattr.user.b": "\x01\xff", "SCHILY.xattr.security.capability": capability}
	owned.Uid, owned.Gid, owned.Mode = 70000, 1<<20, 0o6711
	etc := directory("etc/", 0o2755)
	etc.PAXRecords = map[string]string{"SCHILY.xattr.user.dir": strings.Repeat("d", 300)}
	var holes []byte
	for i := range 6 { // chunks of zeros, and parts of them
		holes = append(append(holes, make([]byte, 4096*i)...), text(uint64(i), 500)...)
	}
	files := []tarFile{
		directory("./", 0o755), etc, small, owned,
		regular("etc/empty", nil),
		regular("etc/big", text(2, 30_000)),
		regular("etc/noise", noise(3, 9000)),
		regular("etc/block", text(4, 4096)),
		regular("etc/same", text(2, 30_000)),
		regular("holes", append(holes, make([]byte, 9000)...)),
		{tar.Header{Name: "etc/hard", Typeflag: tar.TypeLink, Linkname: "etc/big"}, nil},
		{tar.Header{Name: "zz-hard", Typeflag: tar.TypeLink, Linkname: "etc/big"}, nil},
		{tar.Header{Name: "etc/soft", Typeflag: tar.TypeSymlink, Linkname: "../x/./y", Mode: 0o777}, nil},
		{tar.Header{Name: "etc/far", Typeflag: tar.TypeSymlink, Linkname: strings.Repeat("f/", 1500), Mode: 0o777}, nil},
		{tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666}, nil},
		{tar.Header{Name: "disk", Typeflag: tar.TypeBlock, Devmajor: 259, Devminor: 70000, Mode: 0o640}, nil},
		{tar.Header{Name: "pipe", Typeflag: tar.TypeFifo, Mode: 0o600}, nil},
		directory("long/", 0o700), directory("long/"+strings.Repeat("d", 255)+"/", 0o1777),
		regular("long/"+strings.Repeat("d", 255)+"/"+strings.Repeat("é", 127), text(5, 300)),
		directory("many/", 0o755),
	}
	for i := range 180 {
		files = append(files, regular(fmt.Sprintf("many/a-file-with-a-name-%03d", i), text(uint64(i), i*i/40)))
	}
	return files
}

// upper is a layer over tree: it replaces, removes and adds.
func upper() []tarFile {
	return []tarFile{
		directory("./", 0o755), directory("etc/", 0o700),
		regular("etc/big", text(6, 20_000)), // whose other names stay
		regular("etc/.wh.small", nil),
		directory("many/", 0o711), regular("many/.wh..wh..opq", nil), regular("many/left", text(7, 10)),
		regular(".wh.long", nil),
		regular("same", text(2, 30_000)), // as a file of the lower layer
	}
}

// overlay is what tree and upper make together.
func overlay(lower, upper map[string]want) map[string]want {
	out := maps.Clone(lower)
	for path := range lower {
		if path == "etc/small" || strings.HasPrefix(path, "many/") || path == "long" || strings.HasPrefix(path, "long/") {
			delete(out, path)
		}
	}
	for path, w := range upper {
		if !strings.Contains(path, ".wh.") {
			w.file = "upper:" + w.file
			out[path] = w
		}
	}
	return out
}

// tiny is a tree for seeds of fuzzing. Its hard link has no extended attributes,
// with which upstream commit 34e6071e writes wrong bootstraps of v5.
func tiny() []tarFile {
	file := regular("d/file", text(1, 5000))
	file.PAXRecords = map[string]string{"SCHILY.xattr.user.x": "1"}
	return []tarFile{
		directory("./", 0o755), directory("d/", 0o755), file, regular("d/plain", text(2, 10)),
		{tar.Header{Name: "d/hard", Typeflag: tar.TypeLink, Linkname: "d/plain"}, nil},
		{tar.Header{Name: "soft", Typeflag: tar.TypeSymlink, Linkname: "d/file", Mode: 0o777}, nil},
		{tar.Header{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666}, nil},
	}
}

// large is tree with a file that fills several blocks of a gzip stream, far
// larger than it is compressed.
func large() []tarFile {
	words := noise(8, 6400)
	rnd := rand.New(rand.NewPCG(9, 9))
	var b []byte
	for len(b) < 4_500_000 {
		i := rnd.IntN(63) * 100
		b = append(b, words[i:i+100]...)
	}
	return append(tree(), regular("words", b), regular("words.small", b[100_000:200_000]))
}

// writeTar makes a tar with a time for each file, in nanoseconds. As tar does it,
// a hard link has the attributes of its file.
func writeTar(t testing.TB, files []tarFile) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for i, f := range files {
		if f.Typeflag == tar.TypeLink {
			i = slices.IndexFunc(files, func(o tarFile) bool { return o.Name == f.Linkname })
			f.Mode = files[i].Mode
		}
		f.Format, f.Size, f.ModTime = tar.FormatPAX, int64(len(f.data)), time.Unix(1_700_000_000+int64(i), 123_456_789)
		if err := w.WriteHeader(&f.Header); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// gzipped compresses in two members, the first of several blocks.
func gzipped(t testing.TB, plain []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	for _, part := range [][]byte{plain[:len(plain)/2], plain[len(plain)/2:]} {
		w := stdgzip.NewWriter(&b)
		if _, err := w.Write(part); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

// want is what an image must have at one path.
type want struct {
	index.Entry
	data []byte
	file string // the first name of the file, for all of its names
}

// readTree is what a tar says, by path. Hard links have the attributes of their
// file.
func readTree(t testing.TB, plain []byte) map[string]want {
	t.Helper()
	out := map[string]want{}
	for r := tar.NewReader(bytes.NewReader(plain)); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSuffix(strings.TrimPrefix(h.Name, "./"), "/")
		if h.Typeflag == tar.TypeLink {
			out[name] = out[h.Linkname]
			continue
		}
		w := want{Entry: index.Entry{Kind: kinds[h.Typeflag], Mode: uint16(h.Mode), UID: uint32(h.Uid), GID: uint32(h.Gid),
			Sec: h.ModTime.Unix(), Nsec: uint32(h.ModTime.Nanosecond()), Size: h.Size, Link: h.Linkname,
			Major: uint32(h.Devmajor), Minor: uint32(h.Devminor)}, file: name}
		for _, key := range slices.Sorted(maps.Keys(h.PAXRecords)) {
			if x, ok := strings.CutPrefix(key, "SCHILY.xattr."); ok {
				w.Xattrs = append(w.Xattrs, index.Xattr{Name: x, Value: h.PAXRecords[key]})
			}
		}
		if w.data, err = io.ReadAll(r); err != nil {
			t.Fatal(err)
		}
		out[name] = w
	}
}

var kinds = map[byte]index.Kind{
	tar.TypeReg: index.File, tar.TypeDir: index.Dir, tar.TypeSymlink: index.Symlink,
	tar.TypeChar: index.Char, tar.TypeBlock: index.Block, tar.TypeFifo: index.Fifo,
}
