package tarball

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"go/build"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// bigContent is the size from which contents are not compared, bytes: sparse
// files may say that they are larger than memory.
const bigContent = 4 << 20

// content is what the current entry holds, holes included.
func content(r *reader, h *header) ([]byte, error) {
	if h.fragments == nil {
		return io.ReadAll(r)
	}
	b := make([]byte, h.size)
	for _, f := range h.fragments {
		if _, err := io.ReadFull(r, b[f.off:f.off+f.n]); err != nil {
			return nil, err
		}
	}
	return b, nil
}

// describe is what both readers must agree on.
func describe(h *header) string {
	return fmt.Sprintf("%c %q %q size %d mode %o owner %d:%d time %d.%09d device %d:%d",
		h.flag, h.name, h.link, h.size, h.mode, h.uid, h.gid, h.sec, h.nsec, h.major, h.minor)
}

func describeStandard(h *tar.Header) string {
	return describe(&header{flag: h.Typeflag, name: h.Name, link: h.Linkname, size: h.Size, mode: h.Mode,
		uid: int64(h.Uid), gid: int64(h.Gid), sec: h.ModTime.Unix(), nsec: uint32(h.ModTime.Nanosecond()),
		major: h.Devmajor, minor: h.Devminor})
}

// sameAsStandard fails if archive/tar accepts an entry and this package reads
// another one. It returns how many entries were compared.
func sameAsStandard(t *testing.T, stream []byte) int {
	t.Helper()
	std := tar.NewReader(bytes.NewReader(stream))
	own := &reader{src: bytes.NewReader(stream)}
	for n := 0; ; n++ {
		want, wantErr := std.Next()
		for wantErr == nil && want.Typeflag == tar.TypeXGlobalHeader {
			want, wantErr = std.Next()
		}
		if wantErr != nil && !errors.Is(wantErr, io.EOF) {
			return n
		}
		got, err := own.next()
		if errors.Is(wantErr, io.EOF) {
			if !errors.Is(err, io.EOF) {
				t.Fatalf("after %d entries: %v where archive/tar is at the end", n, err)
			}
			return n
		}
		if err != nil {
			t.Fatalf("entry %d (%s): %v", n, describeStandard(want), err)
		}
		if g, w := describe(got), describeStandard(want); g != w {
			t.Fatalf("entry %d:\n got %s\nwant %s", n, g, w)
		}
		if want.Size > bigContent {
			continue
		}
		wantBytes, wantErr := io.ReadAll(std)
		if wantErr != nil {
			return n
		}
		gotBytes, err := content(own, got)
		if err != nil || !bytes.Equal(gotBytes, wantBytes) {
			t.Fatalf("entry %d (%s): %d other bytes, %v", n, describe(got), len(gotBytes), err)
		}
	}
}

// archive writes headers with content of their size.
func archive(tb testing.TB, headers ...*tar.Header) []byte {
	tb.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for _, h := range headers {
		h := *h
		if h.Mode == 0 {
			h.Mode = 0o644
		}
		if err := w.WriteHeader(&h); err != nil {
			tb.Fatal(err)
		}
		if h.Typeflag == tar.TypeReg || h.Typeflag == 0 {
			if _, err := w.Write(fill(h.Size)); err != nil {
				tb.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		tb.Fatal(err)
	}
	return b.Bytes()
}

// fill is n bytes without zeros and with a long period.
func fill(n int64) []byte {
	b := make([]byte, n)
	for i := range b {
		b[i] = byte(1 + i%251)
	}
	return b
}

func torture(tb testing.TB) map[string][]byte {
	long := strings.Repeat("long/", 60) + "name"
	entries := []*tar.Header{
		{Name: "./", Typeflag: tar.TypeDir, Mode: 0o1777},
		{Name: "file", Size: 1000, Mode: 0o4755, Uid: 1 << 20, Gid: 7},
		{Name: "empty"},
		{Name: long, Size: 512},
		{Name: "link", Linkname: long, Typeflag: tar.TypeSymlink},
		{Name: "hard", Linkname: "file", Typeflag: tar.TypeLink},
		{Name: "null", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3},
		{Name: "disk", Typeflag: tar.TypeBlock, Devmajor: 259, Devminor: 1<<20 - 1},
		{Name: "pipe", Typeflag: tar.TypeFifo},
	}
	m := map[string][]byte{"empty": nil, "end": make([]byte, 1024), "one zero block": make([]byte, 512)}
	for _, f := range []tar.Format{tar.FormatGNU, tar.FormatPAX} {
		var list []*tar.Header
		for _, h := range entries {
			h := *h
			h.Format = f
			list = append(list, &h)
		}
		m[f.String()] = archive(tb, list...)
	}
	m["GNU numbers"] = archive(tb, &tar.Header{Name: "x", Uid: 3 << 30, Gid: 1 << 22, ModTime: time.Unix(-5, 0), Format: tar.FormatGNU, Size: 3})
	m["pax numbers"] = archive(tb, &tar.Header{Name: "x", Uid: 3 << 30, Gid: 1 << 22, ModTime: time.Unix(-5, 123456789), Format: tar.FormatPAX, Size: 3},
		&tar.Header{Name: "y", ModTime: time.Unix(-1, 500), Format: tar.FormatPAX},
		&tar.Header{Name: "z", ModTime: time.Unix(1<<35, 999999999), Format: tar.FormatPAX})
	m["devices"] = archive(tb, &tar.Header{Name: "x", Typeflag: tar.TypeChar, Devmajor: 70000, Devminor: 1 << 20})
	m["xattrs"] = archive(tb, &tar.Header{Name: "x", PAXRecords: map[string]string{"SCHILY.xattr.user.a": "1\x002", "SCHILY.xattr.user.b": ""}})
	m["global"] = append(paxHeader('g', "comment=hello"), archive(tb, &tar.Header{Name: "x"})...)
	m["global between"] = append(append(paxHeader('x', "path=lost"), paxHeader('g', "path=global")...), archive(tb, &tar.Header{Name: "x"})...)
	m["pax twice"] = append(append(paxHeader('x', "path=first"), paxHeader('x', "mtime=-1.25")...), archive(tb, &tar.Header{Name: "x", Size: 5})...)
	m["pax size"] = append(paxHeader('x', "size=600"), archive(tb, &tar.Header{Name: "x", Size: 1000})...)
	m["negative pax size"] = append(paxHeader('x', "size=-1"), archive(tb, &tar.Header{Name: "x"})...)
	m["huge pax size"] = append(paxHeader('x', "size=9223372036854775807"), archive(tb, &tar.Header{Name: "x"})...)
	m["bad pax"] = append(paxHeader('x', "path"), archive(tb, &tar.Header{Name: "x"})...)
	m["sparse 1.0"] = append(paxHeader('x', "GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.name=holes", "GNU.sparse.realsize=100000"),
		sparseData("2\n512\n300\n70000\n400\n", 700)...)
	m["sparse 1.0, empty"] = append(paxHeader('x', "GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.realsize=100000"),
		sparseData("0\n", 0)...)
	m["sparse 0.1"] = append(paxHeader('x', "GNU.sparse.numblocks=2", "GNU.sparse.map=512,300,70000,400", "GNU.sparse.name=holes", "GNU.sparse.size=100000"),
		archive(tb, &tar.Header{Name: "x", Size: 700})...)
	m["sparse 0.0"] = append(paxHeader('x', "GNU.sparse.size=100000", "GNU.sparse.numblocks=2", "GNU.sparse.offset=512", "GNU.sparse.numbytes=300", "GNU.sparse.offset=70000", "GNU.sparse.numbytes=400"),
		archive(tb, &tar.Header{Name: "x", Size: 700})...)
	m["sparse, too long"] = append(paxHeader('x', "GNU.sparse.size=100", "GNU.sparse.numblocks=1", "GNU.sparse.map=50,51"),
		archive(tb, &tar.Header{Name: "x", Size: 51})...)
	m["sparse, overflow"] = append(paxHeader('x', "GNU.sparse.size=9223372036854775807", "GNU.sparse.numblocks=1", "GNU.sparse.map=9223372036854775807,9223372036854775807"),
		archive(tb, &tar.Header{Name: "x", Size: 51})...)
	m["sparse, overlap"] = append(paxHeader('x', "GNU.sparse.size=100", "GNU.sparse.numblocks=2", "GNU.sparse.map=0,10,5,10"),
		archive(tb, &tar.Header{Name: "x", Size: 20})...)
	m["sparse, negative"] = append(paxHeader('x', "GNU.sparse.size=-9223372036854775808", "GNU.sparse.numblocks=1", "GNU.sparse.map=5,1"),
		archive(tb, &tar.Header{Name: "x", Size: 20})...)
	m["sparse, more data than the map"] = append(paxHeader('x', "GNU.sparse.size=100", "GNU.sparse.numblocks=1", "GNU.sparse.map=0,10"),
		archive(tb, &tar.Header{Name: "x", Size: 20})...)
	return m
}

// paxHeader is an extended header with records.
func paxHeader(flag byte, records ...string) []byte {
	var data []byte
	for _, r := range records {
		n := len(r) + 3
		for n != len(fmt.Sprintf("%d %s\n", n, r)) {
			n++
		}
		data = fmt.Appendf(data, "%d %s\n", n, r)
	}
	return append(rawHeader(flag, "pax", int64(len(data))), pad(data)...)
}

func pad(b []byte) []byte {
	return append(b, make([]byte, -len(b)&(blockSize-1))...)
}

// rawHeader is a ustar header block.
func rawHeader(flag byte, name string, size int64) []byte {
	var b block
	copy(b[0:], name)
	copy(b[100:], "0000644\x000000000\x000000000\x00")
	copy(b[124:], fmt.Sprintf("%011o\x0000000000000\x00", size))
	b[156] = flag
	copy(b[257:], "ustar\x0000")
	return b.seal()
}

// seal sets the checksum.
func (b *block) seal() []byte {
	copy(b.chksum(), "        ")
	sum := 0
	for _, c := range b {
		sum += int(c)
	}
	copy(b.chksum(), fmt.Sprintf("%06o\x00 ", sum))
	return b[:]
}

// sparseData is a file that begins with a sparse map.
func sparseData(m string, n int64) []byte {
	data := append(pad([]byte(m)), fill(n)...)
	return append(rawHeader('0', "GNUSparseFile/x", int64(len(data))), pad(data)...)
}

func TestReader(t *testing.T) {
	for name, stream := range torture(t) {
		t.Run(name, func(t *testing.T) { sameAsStandard(t, stream) })
	}
}

// TestReaderTruncated cuts a stream everywhere.
func TestReaderTruncated(t *testing.T) {
	stream := torture(t)["PAX"]
	for n := range stream {
		sameAsStandard(t, stream[:n])
	}
}

// TestReaderStandard reads the archives that archive/tar itself is tested with:
// all dialects, and what was found wrong with it over the years.
func TestReaderStandard(t *testing.T) {
	dir := filepath.Join(build.Default.GOROOT, "src", "archive", "tar", "testdata")
	files, err := filepath.Glob(filepath.Join(dir, "*.tar"))
	if err != nil {
		t.Fatal(err)
	}
	if len(files) == 0 {
		t.Skip("needs the sources of archive/tar in GOROOT")
	}
	entries := 0
	for _, name := range files {
		stream, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		t.Run(filepath.Base(name), func(t *testing.T) { entries += sameAsStandard(t, stream) })
	}
	if entries < 50 {
		t.Errorf("only %d entries compared", entries)
	}
}

// TestReaderGNUTar reads what GNU tar makes of sparse files in its formats.
func TestReaderGNUTar(t *testing.T) {
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skip("needs GNU tar")
	}
	dir := t.TempDir()
	f, err := os.Create(filepath.Join(dir, "holes"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range int64(40) { // more fragments than the first header holds
		if _, err := f.WriteAt(fill(4096), 40<<10*(i+1)); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(2 << 20); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	for _, args := range [][]string{
		{"--format=gnu"}, {"--format=pax", "--sparse-version=0.0"},
		{"--format=pax", "--sparse-version=0.1"}, {"--format=pax", "--sparse-version=1.0"},
	} {
		t.Run(strings.Join(args, " "), func(t *testing.T) {
			cmd := exec.CommandContext(t.Context(), "tar", append(args, "--sparse", "--hole-detection=raw", "-cf", "-", "-C", dir, "holes")...)
			stream, err := cmd.Output()
			if err != nil {
				t.Skipf("needs GNU tar with sparse files: %v", err)
			}
			if n := sameAsStandard(t, stream); n != 1 {
				t.Fatalf("%d entries", n)
			}
			if len(stream) > 400<<10 {
				t.Errorf("%d bytes: not sparse", len(stream))
			}
			checkScan(t, stream)
		})
	}
}
