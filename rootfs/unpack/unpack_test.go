package unpack

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tests/treecmp"
)

// blobs is a registry in memory.
type blobs map[digest.Digest][]byte

func (b blobs) Open(_ context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	data, ok := b[desc.Digest]
	if !ok {
		return nil, fmt.Errorf("blob %s: %w", desc.Digest, errdefs.ErrNotFound)
	}
	return io.NopCloser(bytes.NewReader(data)), nil
}

func (b blobs) add(data []byte) ocispec.Descriptor {
	d := digest.FromBytes(data)
	b[d] = data
	return ocispec.Descriptor{Digest: d, Size: int64(len(data))}
}

func (b blobs) addLayer(t *testing.T, pack func([]byte) ([]byte, error), entries ...registrytest.Entry) ocispec.Descriptor {
	t.Helper()
	data, err := registrytest.Tar(entries...)
	if err == nil {
		data, err = pack(data)
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.add(data)
}

func plain(b []byte) ([]byte, error) { return b, nil }

func gzipped(b []byte) ([]byte, error) {
	l, err := registrytest.Gzip(b)
	return l.Blob, err
}

func zstded(b []byte) ([]byte, error) {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		return nil, err
	}
	return w.EncodeAll(b, nil), nil
}

// frames is zstd in as many frames as real tools make of large layers, after a
// skippable one as pzstd writes it.
func frames(b []byte) ([]byte, error) {
	w, err := zstd.NewWriter(nil)
	if err != nil {
		return nil, err
	}
	out := []byte("\x50\x2a\x4d\x18\x04\x00\x00\x00\x78\x56\x34\x12")
	for part := range slices.Chunk(b, 700) {
		out = w.EncodeAll(part, out)
	}
	return out, nil
}

func openTable(t *testing.T) *Table {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: mounts tmpfs and overlay")
	}
	dir := filepath.Join(t.TempDir(), "table")
	table, err := Open(dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Remove(context.Background(), dir); err != nil {
			t.Error(err)
		}
	})
	return table
}

func mountLayers(t *testing.T, b blobs, layers ...ocispec.Descriptor) string {
	t.Helper()
	table := openTable(t)
	target := filepath.Join(t.TempDir(), "rootfs")
	_, err := table.Mount(t.Context(), Spec{ID: "c1", Manifest: manifestOf(layers), Layers: layers, Blobs: b, Target: target})
	if err != nil {
		t.Fatal(err)
	}
	return target
}

func manifestOf(layers []ocispec.Descriptor) digest.Digest {
	return digest.FromString(fmt.Sprint(layers))
}

// tree lists what is at root: one line for each name.
func tree(t *testing.T, root string) []string {
	t.Helper()
	nodes, err := treecmp.Snapshot(root)
	if err != nil {
		t.Fatal(err)
	}
	var lines []string
	for name, n := range nodes {
		if name == "." {
			continue
		}
		line := fmt.Sprintf("%s %o", name, n.Mode)
		switch n.Mode & unix.S_IFMT {
		case unix.S_IFREG:
			b, err := os.ReadFile(filepath.Join(root, name))
			if err != nil {
				t.Fatal(err)
			}
			line += " " + string(b)
		case unix.S_IFLNK:
			line += " -> " + n.Link
		}
		if n.Group != "" && n.Group != name {
			line += " = " + n.Group
		}
		lines = append(lines, line)
	}
	slices.Sort(lines)
	return lines
}

var (
	tarDir  = registrytest.Dir
	tarFile = registrytest.File
	tarSym  = registrytest.Symlink
	tarHard = registrytest.Hardlink
)

func entry(h tar.Header) registrytest.Entry { return registrytest.Entry{Header: h} }

func TestLayersAreMerged(t *testing.T) {
	cases := []struct {
		name   string
		layers [][]registrytest.Entry
		want   []string
	}{
		{"whiteouts and opaque", [][]registrytest.Entry{
			{tarDir("d/", 0o755), tarFile("d/a", 0o644, "1"), tarFile("d/b", 0o600, "2"), tarDir("e/", 0o755), tarFile("e/x", 0o644, "3"), tarFile("gone", 0o644, "4")},
			{tarDir("d/", 0o700), tarFile("d/.wh.a", 0, ""), tarFile(".wh.gone", 0, ""), tarFile("e/new", 0o644, "5"), tarFile("e/.wh..wh..opq", 0, "")},
		}, []string{"d 40700", "d/b 100600 2", "e 40755", "e/new 100644 5"}},
		{"a name is hidden and made again", [][]registrytest.Entry{
			{tarDir("d/", 0o755), tarFile("d/old", 0o644, "1"), tarFile("f", 0o644, "old")},
			{tarFile(".wh.d", 0, ""), tarDir("d/", 0o755), tarFile("d/new", 0o644, "2"), tarFile("f", 0o644, "new"), tarFile(".wh.f", 0, "")},
		}, []string{"d 40755", "d/new 100644 2", "f 100644 new"}},
		{"hidden after it was made", [][]registrytest.Entry{
			{tarDir("d/", 0o755), tarFile("d/old", 0o644, "1")},
			{tarDir("d/", 0o755), tarFile("d/new", 0o644, "2"), tarFile(".wh.d", 0, "")},
		}, []string{"d 40755", "d/new 100644 2"}},
		{"file over directory and back", [][]registrytest.Entry{
			{tarDir("a/", 0o755), tarFile("a/x", 0o644, "1"), tarFile("b", 0o644, "2")},
			{tarFile("a", 0o644, "file"), tarDir("b/", 0o755), tarFile("b/y", 0o644, "3")},
		}, []string{"a 100644 file", "b 40755", "b/y 100644 3"}},
		{"the last of equal names counts", [][]registrytest.Entry{
			{tarFile("a", 0o644, "1"), tarDir("a/", 0o755), tarFile("a/x", 0o644, "2"), tarFile("a", 0o600, "3"), tarFile("c", 0o600, "4"), tarSym("c", "a")},
		}, []string{"a 100600 3", "c 120777 -> a"}},
		{"hard links", [][]registrytest.Entry{
			{tarDir("lower/", 0o700), tarFile("lower/f", 0o640, "low")},
			{tarFile("a", 0o644, "x"), tarHard("b", "a"), tarHard("./c", "/b"), tarHard("l", "lower/f")},
		}, []string{"a 100644 x", "b 100644 x = a", "c 100644 x = a", "l 100640 low", "lower 40700", "lower/f 100640 low = l"}},
		{"directories that no entry names", [][]registrytest.Entry{
			{tarDir("p/", 0o711), tarDir("p/q/", 0o1777)},
			{tarFile("p/q/r/f", 0o644, "x")},
		}, []string{"p 40711", "p/q 41777", "p/q/r 40755", "p/q/r/f 100644 x"}},
		{"through links of the layer", [][]registrytest.Entry{
			{tarSym("lib", "usr/lib"), tarFile("lib/a", 0o644, "1"), tarSym("abs", "/usr/lib"), tarFile("abs/b", 0o644, "2"), tarSym("up", "../../../usr"), tarFile("up/c", 0o644, "3")},
		}, []string{"abs 120777 -> /usr/lib", "lib 120777 -> usr/lib", "up 120777 -> ../../../usr", "usr 40755", "usr/c 100644 3", "usr/lib 40755", "usr/lib/a 100644 1", "usr/lib/b 100644 2"}},
		{"AUFS records", [][]registrytest.Entry{
			{tarFile(".wh..wh.aufs", 0o644, ""), tarDir(".wh..wh.plnk/", 0o755), tarFile("a", 0o644, "")},
		}, []string{"a 100644 "}},
		{"no layer is empty", [][]registrytest.Entry{{}, {tarFile("a", 0o644, "")}, {}}, []string{"a 100644 "}},
	}
	for _, c := range cases {
		for packing, pack := range map[string]func([]byte) ([]byte, error){"tar": plain, "gzip": gzipped, "zstd": zstded, "zstd frames": frames} {
			t.Run(c.name+"/"+packing, func(t *testing.T) {
				b := blobs{}
				var layers []ocispec.Descriptor
				for _, l := range c.layers {
					layers = append(layers, b.addLayer(t, pack, l...))
				}
				if got := tree(t, mountLayers(t, b, layers...)); !slices.Equal(got, c.want) {
					t.Errorf("got  %q\nwant %q", got, c.want)
				}
			})
		}
	}
}

func TestAttributes(t *testing.T) {
	when := time.Date(2001, 2, 3, 4, 5, 6, 789, time.UTC)
	with := func(h tar.Header) registrytest.Entry {
		h.ModTime, h.Uid, h.Gid, h.Format = when, 1234567, 7654321, tar.FormatPAX
		h.PAXRecords = map[string]string{"SCHILY.xattr.security.x": "\x00value", "SCHILY.xattr.trusted.overlay.redirect": "/etc", "SCHILY.xattr.trusted.x": "y"}
		return entry(h)
	}
	b := blobs{}
	root := mountLayers(t, b, b.addLayer(t, gzipped,
		with(tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o751}),
		with(tar.Header{Name: "d/", Typeflag: tar.TypeDir, Mode: 0o2500}),
		with(tar.Header{Name: "d/f", Typeflag: tar.TypeReg, Mode: 0o4711}),
		with(tar.Header{Name: "d/l", Typeflag: tar.TypeSymlink, Linkname: "nowhere", Mode: 0o777}),
		with(tar.Header{Name: "d/c", Typeflag: tar.TypeChar, Mode: 0o640, Devmajor: 10, Devminor: 229}),
		with(tar.Header{Name: "d/b", Typeflag: tar.TypeBlock, Mode: 0o600, Devmajor: 7, Devminor: 1000}),
		with(tar.Header{Name: "d/p", Typeflag: tar.TypeFifo, Mode: 0o622}),
	))
	nodes, err := treecmp.Snapshot(root)
	if err != nil {
		t.Fatal(err)
	}
	modes := map[string]uint32{".": 0o40751, "d": 0o42500, "d/f": 0o104711, "d/l": 0o120777, "d/c": 0o20640, "d/b": 0o60600, "d/p": 0o10622}
	if len(nodes) != len(modes) {
		t.Errorf("%d names, want %d", len(nodes), len(modes))
	}
	for name, mode := range modes {
		n := nodes[name]
		if n.Mode != mode || n.UID != 1234567 || n.GID != 7654321 || n.Sec != when.Unix() || n.Nsec != 789 {
			t.Errorf("%s: %o %d:%d %d.%d", name, n.Mode, n.UID, n.GID, n.Sec, n.Nsec)
		}
		if n.Xattrs["security.x"] != "\x00value" || len(n.Xattrs) != 1 {
			t.Errorf("%s: attributes %q", name, n.Xattrs)
		}
	}
	if nodes["d/c"].Rdev != unix.Mkdev(10, 229) || nodes["d/b"].Rdev != unix.Mkdev(7, 1000) {
		t.Errorf("devices %x and %x", nodes["d/c"].Rdev, nodes["d/b"].Rdev)
	}
}

// TestNothingLeavesTheImage unpacks what attackers pack, beside a directory
// that must stay as it is.
func TestNothingLeavesTheImage(t *testing.T) {
	outside := t.TempDir()
	secret := filepath.Join(outside, "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	up := strings.Repeat("../", 20)
	cases := map[string][]registrytest.Entry{
		"dots":                  {tarFile(up+outside[1:]+"/evil", 0o644, "x")},
		"absolute":              {tarFile(outside+"/evil", 0o644, "x")},
		"link then file":        {tarSym("l", outside), tarFile("l/evil", 0o644, "x")},
		"relative link":         {tarSym("l", up+outside[1:]), tarFile("l/evil", 0o644, "x")},
		"link over file":        {tarSym("l", secret), tarFile("l", 0o644, "x")},
		"hard link out":         {tarHard("h", secret), tarFile("h", 0o644, "x")},
		"hard link by link":     {tarSym("l", outside), tarHard("h", "l/secret")},
		"directory by link":     {tarSym("l", outside), tarDir("l/", 0o777), tarDir("l/sub/", 0o777)},
		"mode by link":          {tarSym("l", secret), entry(tar.Header{Name: "l", Typeflag: tar.TypeFifo, Mode: 0o777})},
		"whiteout by link":      {tarSym("l", outside), tarFile("l/.wh.secret", 0, "")},
		"opaque by link":        {tarSym("l", outside), tarFile("l/.wh..wh..opq", 0, "")},
		"whiteout of dots":      {tarFile(".wh...", 0, "")},
		"whiteout of the dir":   {tarFile("d/.wh..", 0, "")},
		"proc":                  {tarSym("l", "/proc/self/root"), tarFile("l"+outside+"/evil", 0o644, "x")},
		"loop of links":         {tarSym("a", "b"), tarSym("b", "a"), tarFile("a/x", 0o644, "x")},
		"file as parent":        {tarFile("f", 0o644, "x"), tarFile("f/g", 0o644, "y")},
		"replace through link":  {tarSym("l", outside), tarSym("l/secret", "x"), tarDir("l/secret/", 0o755)},
		"root is a file":        {tarFile(".", 0o644, "x")},
		"empty link target":     {tarSym("l", ""), tarFile("l/x", 0o644, "x")},
		"unknown type":          {entry(tar.Header{Name: "s", Typeflag: 'Z'})},
		"device out of range":   {entry(tar.Header{Name: "s", Typeflag: tar.TypeChar, Devmajor: 1 << 20})},
		"hard link to the root": {tarHard("h", "/")},
	}
	before, err := treecmp.Snapshot(outside)
	if err != nil {
		t.Fatal(err)
	}
	for name, entries := range cases {
		t.Run(name, func(t *testing.T) {
			table := openTable(t)
			b := blobs{}
			layer := b.addLayer(t, plain, entries...)
			// Either outcome is good as long as nothing outside changes.
			_, err := table.Mount(t.Context(), Spec{ID: "c1", Manifest: layer.Digest, Layers: []ocispec.Descriptor{layer}, Blobs: b, Target: filepath.Join(t.TempDir(), "r")})
			if err != nil && !strings.Contains(err.Error(), "unpack layer "+layer.Digest.String()) {
				t.Errorf("the error does not name the layer: %v", err)
			}
			after, serr := treecmp.Snapshot(outside)
			if serr != nil {
				t.Fatal(serr)
			}
			if d := treecmp.Diff(before, after); len(d) > 0 {
				t.Errorf("changed outside (error %v): %q", err, d)
			}
		})
	}
}

func TestBadBlobs(t *testing.T) {
	good, err := registrytest.Tar(tarFile("some/file", 0o644, strings.Repeat("x", 5000)))
	if err != nil {
		t.Fatal(err)
	}
	packed, err := gzipped(good)
	if err != nil {
		t.Fatal(err)
	}
	b := blobs{}
	desc := b.add(packed)
	broken := slices.Clone(packed)
	broken[len(broken)/2] ^= 1
	cases := []struct {
		name   string
		data   []byte
		change func(*ocispec.Descriptor)
		class  func(error) bool
		want   string
	}{
		{"flipped bit", broken, nil, errdefs.IsDataLoss, "digest"},
		{"too short", packed[:len(packed)-9], nil, errdefs.IsDataLoss, "digest"},
		{"too long", append(slices.Clone(packed), 0), nil, errdefs.IsDataLoss, "longer"},
		{"empty", nil, nil, errdefs.IsDataLoss, "digest"},
		{"other size", packed, func(d *ocispec.Descriptor) { d.Size++ }, errdefs.IsDataLoss, "bytes"},
		{"no digest", packed, func(d *ocispec.Descriptor) { d.Digest = "md5:00" }, errdefs.IsInvalidArgument, "sha256"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			table := openTable(t)
			d := desc
			if c.change != nil {
				c.change(&d)
			}
			_, err := table.Mount(t.Context(), Spec{ID: "c1", Manifest: desc.Digest, Layers: []ocispec.Descriptor{d}, Blobs: blobs{d.Digest: c.data}, Target: filepath.Join(t.TempDir(), "r")})
			if err == nil || !c.class(err) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error %v", err)
			}
			if left, _ := os.ReadDir(table.imagesDir()); len(left) > 0 {
				t.Errorf("left over: %v", left)
			}
		})
	}
	// Right digest, but no archive.
	t.Run("no archive", func(t *testing.T) {
		table := openTable(t)
		b := blobs{}
		d := b.add([]byte(strings.Repeat("no tar", 1000)))
		_, err := table.Mount(t.Context(), Spec{ID: "c1", Manifest: d.Digest, Layers: []ocispec.Descriptor{d}, Blobs: b, Target: filepath.Join(t.TempDir(), "r")})
		if err == nil || !strings.Contains(err.Error(), "read tar") {
			t.Errorf("error %v", err)
		}
	})
}

// TestDiffID tells layers that were compressed right from those that were not.
func TestDiffID(t *testing.T) {
	good, err := registrytest.Tar(tarFile("f", 0o644, strings.Repeat("x", 5000)))
	if err != nil {
		t.Fatal(err)
	}
	for packing, pack := range map[string]func([]byte) ([]byte, error){"tar": plain, "gzip": gzipped, "zstd": zstded, "zstd frames": frames} {
		t.Run(packing, func(t *testing.T) {
			data, err := pack(good)
			if err != nil {
				t.Fatal(err)
			}
			b := blobs{}
			layers := []ocispec.Descriptor{b.add(data)}
			for want, ids := range map[string][]digest.Digest{
				"":                             {digest.FromBytes(good)},
				"the image's config names":     {digest.FromString("another")},
				"unpack 1 layers with 2 diffI": {digest.FromBytes(good), digest.FromBytes(good)},
			} {
				_, err := Image(t.Context(), t.TempDir(), layers, ids, b)
				if want == "" && err != nil || want != "" && (err == nil || !strings.Contains(err.Error(), want)) {
					t.Errorf("want %q, got %v", want, err)
				}
			}
		})
	}
}

// TestPzstd unpacks what the real tool makes: many frames in one blob.
func TestPzstd(t *testing.T) {
	tool, err := exec.LookPath("pzstd")
	if err != nil {
		t.Skip("needs pzstd: ", err)
	}
	body := make([]byte, 20<<20)
	rng := rand.New(rand.NewPCG(1, 2))
	for i := range body {
		body[i] = byte(rng.IntN(4))
	}
	good, err := registrytest.Tar(tarFile("f", 0o644, string(body)))
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), tool, "-p", "2", "-c", "-q")
	cmd.Stdin = bytes.NewReader(good)
	packed, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	if n := bytes.Count(packed, []byte("\x28\xb5\x2f\xfd")); n < 2 {
		t.Fatalf("pzstd made %d frames", n)
	}
	dir := t.TempDir()
	b := blobs{}
	size, err := Image(t.Context(), dir, []ocispec.Descriptor{b.add(packed)}, []digest.Digest{digest.FromBytes(good)}, b)
	if err != nil || size != int64(len(body)) {
		t.Fatalf("%d bytes, %v", size, err)
	}
	got, err := os.ReadFile(filepath.Join(dir, "0", "f"))
	if err != nil || !bytes.Equal(got, body) {
		t.Errorf("other content: %v", err)
	}
}

func TestTable(t *testing.T) {
	table := openTable(t)
	b := blobs{}
	layers := []ocispec.Descriptor{b.addLayer(t, gzipped, tarFile("a", 0o644, "x"))}
	dir := t.TempDir()
	spec := func(id string) Spec {
		return Spec{ID: id, Manifest: manifestOf(layers), Layers: layers, Blobs: b, Target: filepath.Join(dir, id)}
	}
	mount := func(s Spec) Record {
		t.Helper()
		r, err := table.Mount(t.Context(), s)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	if r := mount(spec("c1")); r.Size != 1 {
		t.Errorf("size %d", r.Size)
	}
	b[layers[0].Digest] = nil // from here on nothing may be downloaded again
	mount(spec("c1"))
	mount(spec("c/2"))
	other := spec("c1")
	other.Target += "x"
	if _, err := table.Mount(t.Context(), other); !errdefs.IsAlreadyExists(err) {
		t.Errorf("the same id at another target: %v", err)
	}
	taken := spec("c3")
	taken.Target = filepath.Join(dir, "c1")
	if _, err := table.Mount(t.Context(), taken); !errdefs.IsAlreadyExists(err) {
		t.Errorf("another id at the same target: %v", err)
	}
	readOnly := spec("ro")
	readOnly.ReadOnly = true
	mount(readOnly)
	if err := os.WriteFile(filepath.Join(dir, "ro", "new"), nil, 0o600); !errors.Is(err, unix.EROFS) {
		t.Errorf("write to a read-only mount: %v", err)
	}
	upper := spec("up")
	upper.Upper = filepath.Join(dir, "a,b:c\\d")
	mount(upper)
	if err := os.WriteFile(filepath.Join(dir, "up", "new"), nil, 0o600); err != nil {
		t.Error(err)
	}
	if _, err := os.Stat(filepath.Join(upper.Upper, "upper", "new")); err != nil {
		t.Error(err)
	}

	// The next process knows them all, and notices what is gone.
	again, err := Open(table.dir, nil)
	if err != nil {
		t.Fatal(err)
	}
	if n := len(again.List()); n != 4 {
		t.Errorf("%d records after opening again", n)
	}
	if err := unix.Unmount(filepath.Join(dir, "c/2"), 0); err != nil {
		t.Fatal(err)
	}
	if err := again.Sweep(t.Context()); err != nil {
		t.Error(err)
	}
	if n := len(again.List()); n != 3 {
		t.Errorf("%d records after the sweep", n)
	}
	for _, id := range []string{"c1", "ro", "up"} {
		if err := again.Unmount(t.Context(), id); err != nil {
			t.Error(err)
		}
	}
	if err := again.Unmount(t.Context(), "c1"); !errdefs.IsNotFound(err) {
		t.Errorf("the second unmount: %v", err)
	}
	if left, _ := os.ReadDir(table.imagesDir()); len(left) > 0 {
		t.Errorf("image kept without mounts: %v", left)
	}
}

func TestCancelled(t *testing.T) {
	table := openTable(t)
	b := blobs{}
	layer := b.addLayer(t, plain, tarFile("a", 0o644, "x"))
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := table.unpackTo(ctx, layer, b)
	if !errors.Is(err, context.Canceled) {
		t.Errorf("error %v", err)
	}
}

// TestZerosTakeNoRoom unpacks a sparse file whose header is all there is of it.
func TestZerosTakeNoRoom(t *testing.T) {
	const size = 1 << 30
	b := blobs{}
	var archive bytes.Buffer
	w := tar.NewWriter(&archive)
	if err := w.WriteHeader(&tar.Header{Name: "sparse", Typeflag: tar.TypeReg, Mode: 0o644, Size: 4096, Format: tar.FormatGNU}); err != nil {
		t.Fatal(err)
	}
	makeSparse(archive.Bytes(), size)
	if _, err := w.Write(bytes.Repeat([]byte("x"), 4096)); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	root := mountLayers(t, b, b.add(archive.Bytes()))
	var st unix.Stat_t
	if err := unix.Stat(filepath.Join(root, "sparse"), &st); err != nil {
		t.Fatal(err)
	}
	if st.Size != size || st.Blocks*512 > 1<<20 {
		t.Errorf("size %d, on disk %d", st.Size, st.Blocks*512)
	}
	f, err := os.Open(filepath.Join(root, "sparse"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	got := make([]byte, 12288)
	if _, err := io.ReadFull(f, got); err != nil || strings.Count(string(got), "x") != 4096 || got[4096] != 'x' || got[8191] != 'x' {
		t.Errorf("wrong content, %v", err)
	}
}

// makeSparse makes a GNU header say that its 4096 bytes are those from offset
// 4096 on of a file of the given size (tar.h: struct oldgnu_header).
func makeSparse(header []byte, size int64) {
	header[156] = tar.TypeGNUSparse
	number := func(at int, n int64) { copy(header[at:], fmt.Sprintf("%011o\x00", n)) }
	number(386, 4096)
	number(386+12, 4096)
	number(483, size)
	copy(header[148:], "        ")
	sum := 0
	for _, c := range header[:512] {
		sum += int(c)
	}
	copy(header[148:], fmt.Sprintf("%06o\x00 ", sum))
}

func (t *Table) unpackTo(ctx context.Context, layer ocispec.Descriptor, b Blobs) (int64, error) {
	return Image(ctx, t.imagesDir(), []ocispec.Descriptor{layer}, nil, b)
}

// TestAsUmociDoes holds a random tree in several layers against umoci, which
// unpacks in its own way.
func TestAsUmociDoes(t *testing.T) {
	if _, err := exec.LookPath("umoci"); err != nil {
		t.Skip("needs umoci: " + err.Error())
	}
	for seed := range uint64(4) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) { asUmociDoes(t, seed) })
	}
}

func asUmociDoes(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(1, seed))
	b := blobs{}
	var layers []ocispec.Descriptor
	var tars [][]byte
	for n := range 4 {
		data, err := registrytest.Tar(randomEntries(rng, n)...)
		if err != nil {
			t.Fatal(err)
		}
		tars = append(tars, data)
		layers = append(layers, b.add(data))
	}
	want, err := treecmp.Snapshot(umociUnpack(t, tars))
	if err != nil {
		t.Fatal(err)
	}
	got, err := treecmp.Snapshot(mountLayers(t, b, layers...))
	if err != nil {
		t.Fatal(err)
	}
	delete(want, ".")
	delete(got, ".")
	// Overlay shows the link count of the layer, with names that are hidden.
	if d := treecmp.Diff(got, want, treecmp.Nlink); len(d) > 0 {
		t.Errorf("%d differences, such as %q", len(d), d[:min(len(d), 10)])
	}
	if len(got) < 50 {
		t.Errorf("only %d names", len(got))
	}
}
