package tarball

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
	"time"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// memory is a Segment that keeps what it gets, up to bigContent bytes.
type memory struct {
	bytes.Buffer
	n     int64
	begun map[int64]int64 // sizes of files by where they begin
}

func (m *memory) ReadFrom(r io.Reader) (int64, error) {
	n, err := m.Buffer.ReadFrom(r)
	m.n += n
	return n, err
}

func (m *memory) Begin(path string, size int64) error {
	if p, err := Clean(path); p != path || err != nil || m.n%index.BlockSize != 0 {
		return fmt.Errorf("%s, %d bytes, begins after %d", path, size, m.n)
	}
	if m.begun == nil {
		m.begun = map[int64]int64{}
	}
	m.begun[m.n] = size
	return nil
}

func (m *memory) WriteZeros(n int64) error {
	if n < 0 {
		return fmt.Errorf("%d zeros", n)
	}
	m.n += n
	m.Write(make([]byte, min(n, bigContent)))
	return nil
}

func scan(stream []byte) (*Result, *memory, error) {
	m := new(memory)
	res, err := Scan(bytes.NewReader(stream), m)
	return res, m, err
}

// checkScan scans a stream, and when that works checks the invariants of the
// result and compares all contents with archive/tar.
func checkScan(t *testing.T, stream []byte) {
	t.Helper()
	res, seg, err := scan(stream)
	if err != nil {
		if !errdefs.IsInvalidArgument(err) {
			t.Fatalf("error of another class: %v", err)
		}
		return
	}
	if seg.n != res.Size || res.Size%index.BlockSize != 0 {
		t.Fatalf("segment of %d bytes, %d written", res.Size, seg.n)
	}
	if res.Size > bigContent {
		return
	}
	checkExtents(t, stream, res, seg.Bytes())
	want := contents(t, stream)
	for _, e := range res.Entries {
		if p, err := Clean(e.Path); e.Path != "" && (p != e.Path || err != nil) || e.Kind == 0 || e.Nsec >= 1e9 {
			t.Fatalf("invalid entry %+v", e)
		}
		if e.Kind != index.File || e.Size == 0 {
			continue
		}
		if e.Off%index.BlockSize != 0 || e.Off < 0 || e.Off+e.Size > res.Size {
			t.Fatalf("%s is at %d+%d of %d", e.Path, e.Off, e.Size, res.Size)
		}
		if seg.begun[e.Off] != e.Size {
			t.Fatalf("no file of %d bytes was said to begin at %d", e.Size, e.Off)
		}
		if len(want) > 0 && !slices.ContainsFunc(want[e.Size], func(b []byte) bool {
			return bytes.Equal(b, seg.Bytes()[e.Off:e.Off+e.Size])
		}) {
			t.Fatalf("%s has other content than in the tar", e.Path)
		}
	}
}

// checkExtents rebuilds the segment out of the stream.
func checkExtents(t *testing.T, stream []byte, res *Result, seg []byte) {
	t.Helper()
	rebuilt := make([]byte, res.Size)
	var end index.Extent
	for _, x := range res.Extents {
		if x.Len <= 0 || x.Seg < end.Seg+end.Len || x.Tar < end.Tar+end.Len {
			t.Fatalf("extent %+v behind %+v", x, end)
		}
		copy(rebuilt[x.Seg:x.Seg+x.Len], stream[x.Tar:x.Tar+x.Len])
		end = x
	}
	if !bytes.Equal(rebuilt, seg) {
		t.Fatal("extents do not give the segment")
	}
}

// contents are those of all files that archive/tar finds, by size.
func contents(t *testing.T, stream []byte) map[int64][][]byte {
	t.Helper()
	m := map[int64][][]byte{}
	for r := tar.NewReader(bytes.NewReader(stream)); ; {
		h, err := r.Next()
		if err != nil {
			return m
		}
		if h.Size > bigContent {
			continue
		}
		b, err := io.ReadAll(r)
		if err != nil {
			return m
		}
		m[h.Size] = append(m[h.Size], b)
	}
}

func TestScanTorture(t *testing.T) {
	for name, stream := range torture(t) {
		t.Run(name, func(t *testing.T) { checkScan(t, stream) })
	}
}

func TestScanEntries(t *testing.T) {
	at := time.Unix(-7, 250)
	res, _, err := scan(archive(t,
		&tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755},
		&tar.Header{Name: "/usr/", Typeflag: tar.TypeDir, Mode: 0o2755, Uid: 1 << 22, Gid: 4294967294, ModTime: at, Format: tar.FormatPAX},
		&tar.Header{Name: "./usr//a", Size: 5000, Mode: 0o4711, PAXRecords: map[string]string{
			"SCHILY.xattr.user.z":                      "last",
			"SCHILY.xattr.security.capability":         "\x01\x00\x00\x02",
			"SCHILY.xattr.system.posix_acl_access":     "\x02\x00\x00\x00",
			"SCHILY.xattr.com.apple.provenance":        "dropped",
			"LIBARCHIVE.xattr.user.z":                  "b3RoZXI=",
			"LIBARCHIVE.xattr.user.caf%C3%A9%20%25":    "YWI",
			"LIBARCHIVE.xattr.com.apple.quarantine%21": "YWI",
		}},
		&tar.Header{Name: "b", Size: 1},
		&tar.Header{Name: "hard", Typeflag: tar.TypeLink, Linkname: "/usr/./a"},
		&tar.Header{Name: "sym", Typeflag: tar.TypeSymlink, Linkname: "../..//x"},
		&tar.Header{Name: "dev", Typeflag: tar.TypeBlock, Devmajor: 259, Devminor: 70000},
		&tar.Header{Name: "d/.wh.gone"},
		&tar.Header{Name: "d/.wh..wh..opq", Size: 3},
		&tar.Header{Name: ".wh..wh..opq"},
		&tar.Header{Name: ".wh..wh.aufs"},
		&tar.Header{Name: ".wh..wh.orph/", Typeflag: tar.TypeDir},
		&tar.Header{Name: "x/../y"},
	))
	if err != nil {
		t.Fatal(err)
	}
	want := []index.Entry{
		{Path: "", Kind: index.Dir, Mode: 0o755},
		{Path: "usr", Kind: index.Dir, Mode: 0o2755, UID: 1 << 22, GID: 4294967294, Sec: -7, Nsec: 250},
		{Path: "usr/a", Kind: index.File, Mode: 0o4711, Size: 5000, Xattrs: []index.Xattr{
			{Name: "security.capability", Value: "\x01\x00\x00\x02"},
			{Name: "system.posix_acl_access", Value: "\x02\x00\x00\x00"},
			{Name: "user.café %", Value: "ab"},
			{Name: "user.z", Value: "last"},
		}},
		{Path: "b", Kind: index.File, Mode: 0o644, Size: 1, Off: 8192},
		{Path: "hard", Kind: index.Hardlink, Link: "usr/a"},
		{Path: "sym", Kind: index.Symlink, Mode: 0o644, Link: "../..//x"},
		{Path: "dev", Kind: index.Block, Mode: 0o644, Major: 259, Minor: 70000},
		{Path: "d/gone", Kind: index.Whiteout},
		{Path: "d", Kind: index.Opaque},
		{Path: "", Kind: index.Opaque},
		{Path: "y", Kind: index.File, Mode: 0o644},
	}
	for i := range max(len(want), len(res.Entries)) {
		if i >= len(want) || i >= len(res.Entries) {
			t.Fatalf("%d entries, want %d: %+v", len(res.Entries), len(want), res.Entries)
		}
		if g, w := fmt.Sprintf("%+v", res.Entries[i]), fmt.Sprintf("%+v", want[i]); g != w {
			t.Errorf("entry %d:\n got %s\nwant %s", i, g, w)
		}
	}
	if res.Size != 12288 || len(res.Extents) != 2 {
		t.Errorf("segment of %d bytes, extents %v", res.Size, res.Extents)
	}
}

// TestScanAufsLinks: files in aufs's link directory exist only through links.
func TestScanAufsLinks(t *testing.T) {
	res, _, err := scan(archive(t,
		&tar.Header{Name: ".wh..wh.plnk/", Typeflag: tar.TypeDir},
		&tar.Header{Name: ".wh..wh.plnk/12.34", Size: 10, Mode: 0o600},
		&tar.Header{Name: ".wh..wh.plnk/unused", Size: 10},
		&tar.Header{Name: "a", Typeflag: tar.TypeLink, Linkname: ".wh..wh.plnk/12.34"},
		&tar.Header{Name: "b", Typeflag: tar.TypeLink, Linkname: ".wh..wh.plnk/12.34"},
	))
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%+v", []index.Entry{
		{Path: "a", Kind: index.File, Mode: 0o600, Size: 10},
		{Path: "b", Kind: index.Hardlink, Link: "a"},
	})
	if got := fmt.Sprintf("%+v", res.Entries); got != want {
		t.Errorf("got %s\nwant %s", got, want)
	}
}

func TestScanSparse(t *testing.T) {
	for _, name := range []string{"sparse 1.0", "sparse 0.1", "sparse 0.0"} {
		res, seg, err := scan(torture(t)[name])
		if err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		want := make([]byte, 102400)
		copy(want[512:], fill(700)[:300])
		copy(want[70000:], fill(700)[300:])
		if !bytes.Equal(seg.Bytes(), want) {
			t.Errorf("%s: other content", name)
		}
		if len(res.Extents) != 2 || res.Extents[1].Seg != 70000 || res.Extents[1].Len != 400 || res.Entries[0].Size != 100000 {
			t.Errorf("%s: %+v", name, res)
		}
	}
}

// TestScanHugeHole has a file of 1 TiB that takes up a block.
func TestScanHugeHole(t *testing.T) {
	stream := append(paxHeader('x', "GNU.sparse.major=1", "GNU.sparse.minor=0", "GNU.sparse.realsize=1099511627776"),
		sparseData("1\n1099511627770\n6\n", 6)...)
	res, seg, err := scan(stream)
	if err != nil {
		t.Fatal(err)
	}
	if res.Size != 1<<40 || seg.n != 1<<40 || res.Extents[0].Seg != 1<<40-6 {
		t.Errorf("%+v", res)
	}
}

func TestScanErrors(t *testing.T) {
	name := func(h tar.Header) []byte { return archive(t, &h) }
	huge := strings.Repeat("x", 70<<10)
	cases := []struct {
		name   string
		stream []byte
		says   string
	}{
		{"device", name(tar.Header{Name: "d", Typeflag: tar.TypeChar, Devmajor: 4096}), "device number"},
		{"escape", name(tar.Header{Name: "a/../../etc/passwd"}), `"a/../../etc/passwd"`},
		{"dots", name(tar.Header{Name: ".."}), "out of the layer"},
		{"no name", append(rawHeader('0', "", 0), make([]byte, 1024)...), "empty name"},
		{"long element", name(tar.Header{Name: strings.Repeat("n", 256)}), "255"},
		{"long path", name(tar.Header{Name: strings.Repeat("n/", 2500)}), "4095"},
		{"root file", name(tar.Header{Name: "./."}), "root"},
		{"link escape", name(tar.Header{Name: "l", Typeflag: tar.TypeLink, Linkname: "../x"}), "out of the layer"},
		{"link to itself", name(tar.Header{Name: "l", Typeflag: tar.TypeLink, Linkname: "./l"}), "itself"},
		{"symlink to nothing", append(rawHeader('2', "l", 0), make([]byte, 1024)...), "target"},
		{"whiteout of nothing", name(tar.Header{Name: "d/.wh."}), "whiteout"},
		{"whiteout of the parent", name(tar.Header{Name: "d/.wh..."}), "whiteout"},
		{"volume label", append(rawHeader('V', "label", 0), make([]byte, 1024)...), "type 'V'"},
		{"owner", append(paxHeader('x', "uid=4294967295"), name(tar.Header{Name: "x"})...), "owner"},
		{"negative owner", append(paxHeader('x', "gid=-1"), name(tar.Header{Name: "x"})...), "owner"},
		{"xattr value", append(paxHeader('x', "SCHILY.xattr.user.x="+huge), name(tar.Header{Name: "x"})...), "65536"},
		{"xattr name", append(paxHeader('x', "SCHILY.xattr.user."+huge[:300]+"=x"), name(tar.Header{Name: "x"})...), "name of extended attribute"},
		{"xattr encoding", append(paxHeader('x', "LIBARCHIVE.xattr.user.x=!"), name(tar.Header{Name: "x"})...), "base64"},
		{"pax header", append(paxHeader('x', "comment="+strings.Repeat("c", 1<<20)), name(tar.Header{Name: "x"})...), "1 MiB"},
		{"sparse data", torture(t)["sparse, more data than the map"], "sparse"},
		{"too large", append(paxHeader('x', "size=35184372088832"), name(tar.Header{Name: "x"})...), "does not fit"},
		{"truncated", name(tar.Header{Name: "x", Size: 600})[:600], "EOF"},
		{"garbage", bytes.Repeat([]byte("garbage!"), 64), "checksum"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, _, err := scan(c.stream)
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
			if err != nil && len(err.Error()) > 1000 {
				t.Errorf("error of %d bytes", len(err.Error()))
			}
		})
	}
}

// TestScanSourceError holds that a broken source is not the layer's fault.
func TestScanSourceError(t *testing.T) {
	broken := errors.New("connection reset")
	stream := torture(t)["PAX"]
	for n := range len(stream) - 1024 {
		_, err := Scan(io.MultiReader(bytes.NewReader(stream[:n]), iotest.ErrReader(broken)), new(memory))
		if !errors.Is(err, broken) || errdefs.IsInvalidArgument(err) {
			t.Fatalf("source fails after %d bytes: %v", n, err)
		}
	}
}

func FuzzTar(f *testing.F) {
	for _, stream := range torture(f) {
		f.Add(stream)
	}
	f.Fuzz(func(t *testing.T, stream []byte) {
		if len(stream) > 1<<20 {
			return
		}
		sameAsStandard(t, stream)
		checkScan(t, stream)
		stream = reseal(stream)
		sameAsStandard(t, stream)
		checkScan(t, stream)
	})
}

// reseal makes the checksums of what looks like headers right, for changes
// elsewhere in them would not get past those.
func reseal(stream []byte) []byte {
	stream = bytes.Clone(stream)
	for at := 0; at+blockSize <= len(stream); at += blockSize {
		if b := (*block)(stream[at:]); string(b[257:262]) == "ustar" {
			b.seal()
		}
	}
	return stream
}
