package bootstrap_test

import (
	"bytes"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/bootstrap"
	"github.com/tatami-containers/tatami/rootfs/index"
)

func mustBuild(t testing.TB, layers ...*index.Layer) *index.Image {
	t.Helper()
	img, err := bootstrap.Build(manifest(), layers)
	if err != nil {
		t.Fatal(err)
	}
	if err := img.Validate(); err != nil {
		t.Fatal(err)
	}
	return img
}

// layerOf makes a layer whose segment is large enough for the entries.
func layerOf(entries ...index.Entry) *index.Layer {
	l := &index.Layer{Blob: digest.FromString(fmt.Sprint(len(entries))), Entries: entries, Access: index.Access{Format: index.Tar}}
	var layout index.Layout
	for i := range entries {
		entries[i].Off = layout.Place(entries[i].Size)
	}
	l.Table.Size = layout.Size()
	return l
}

func largeLayer(size int64) *index.Layer {
	return layerOf(index.Entry{Path: "large", Kind: index.File, Size: size})
}

func file(path string) index.Entry { return index.Entry{Path: path, Kind: index.File} }

// What a layer gets wrong is told with its digest and the path.
func TestBuildRefuses(t *testing.T) {
	dir := index.Entry{Path: "d", Kind: index.Dir}
	link := func(path, target string) index.Entry {
		return index.Entry{Path: path, Kind: index.Hardlink, Link: target}
	}
	symlink := func(path, target string) index.Entry {
		return index.Entry{Path: path, Kind: index.Symlink, Link: target}
	}
	xattr := func(name, value string) index.Entry {
		return index.Entry{Path: "x", Kind: index.File, Xattrs: []index.Xattr{{Name: name, Value: value}}}
	}
	many := index.Entry{Path: "x", Kind: index.File}
	for i := range 5 {
		many.Xattrs = append(many.Xattrs, index.Xattr{Name: fmt.Sprintf("user.%d", i), Value: strings.Repeat("v", 60_000)})
	}
	tests := []struct {
		name    string
		entries []index.Entry
		want    string
	}{
		{"invalid entry", []index.Entry{{Path: "../x", Kind: index.File}}, `"../x": path`},
		{"below a file", []index.Entry{file("a"), file("a/b")}, `"a/b": the layer has something at the parent "a"`},
		{"below a device", []index.Entry{{Path: "a", Kind: index.Fifo}, file("a/b/c")}, "not a directory"},
		{"whiteout below a file", []index.Entry{file("a"), {Path: "a/b", Kind: index.Whiteout}}, "not a directory"},
		{"opaque file", []index.Entry{file("a"), {Path: "a", Kind: index.Opaque}}, "not a directory"},
		{"hard link to nothing", []index.Entry{link("a", "b")}, `"a": hard link to "b", which does not exist`},
		{"hard links in a circle", []index.Entry{link("a", "b"), link("b", "a")}, "does not exist"},
		{"hard link to itself", []index.Entry{file("a"), link("a", "a")}, "does not exist"},
		{"hard link into what it replaces", []index.Entry{file("a/b"), link("a", "a/b")}, "does not exist"},
		{"hard link to what the layer removes", []index.Entry{{Path: "low", Kind: index.Whiteout}, link("a", "low")}, "does not exist"},
		{"hard link into an opaque directory", []index.Entry{{Path: "lowdir", Kind: index.Opaque}, link("a", "lowdir/f")}, "does not exist"},
		{"hard link below an opaque root", []index.Entry{{Kind: index.Opaque}, link("a", "low")}, "does not exist"},
		{"hard link to a directory", []index.Entry{dir, link("a", "d")}, "is a directory"},
		{"hard link to a lower directory", []index.Entry{link("a", "lowdir")}, "is a directory"},
		{"symlinks in a circle", []index.Entry{symlink("a", "b"), symlink("b", "a"), file("a/x")}, "more than 255 symlinks"},
		{"symlink to a long name", []index.Entry{symlink("a", strings.Repeat("n", 300)), file("a/x")}, "name of 300 bytes"},
		{"too deep", []index.Entry{symlink("a", "d"), symlink("d/d", strings.Repeat("e/", 2000)), file("a/d/" + strings.Repeat("f/", 100) + "x")}, "more than 2048 directories"},
		{"attribute too long", []index.Entry{xattr("user.x", strings.Repeat("v", 65536))}, "65536 bytes"},
		{"attributes too large", []index.Entry{many}, "attributes take"},
		{"broken ACL", []index.Entry{xattr("system.posix_acl_access", "\x02\x00\x00\x00x")}, "not an ACL"},
	}
	low := layerOf(index.Entry{Path: "lowdir", Kind: index.Dir}, file("low"), file("lowdir/f"))
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			l := layerOf(tt.entries...)
			l.Blob = digest.FromString(tt.name)
			_, err := bootstrap.Build(manifest(), []*index.Layer{low, l})
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("%v, want %q", err, tt.want)
			}
			if !strings.Contains(err.Error(), l.Blob.String()) {
				t.Errorf("%v does not name the layer", err)
			}
		})
	}
}

// A chain of symlinks, each of which goes through the one before twice, must
// not take exponential time.
func TestSymlinkBomb(t *testing.T) {
	entries := []index.Entry{{Path: "d", Kind: index.Dir}, {Path: "l0", Kind: index.Symlink, Link: "d/../d"}}
	for i := range 40 {
		entries = append(entries, index.Entry{Path: fmt.Sprintf("l%d", i+1), Kind: index.Symlink, Link: fmt.Sprintf("l%d/../l%d", i, i)})
	}
	entries = append(entries, file("l40/x"))
	if _, err := bootstrap.Build(manifest(), []*index.Layer{layerOf(entries...)}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("%v", err)
	}
}

func TestSegments(t *testing.T) {
	a := layerOf(index.Entry{Path: "a", Kind: index.File, Size: 5000})
	b := layerOf(index.Entry{Path: "b", Kind: index.File, Size: 100})
	none := layerOf(file("empty"))
	again := layerOf(index.Entry{Path: "other", Kind: index.File, Size: 5001})
	img := mustBuild(t, a, none, b, again)
	if len(img.Segments) != 2 {
		t.Fatalf("%d segments, want 2", len(img.Segments))
	}
	if s := img.Segments[0]; s.ID != a.Table.ID() || s.Layer != a.Blob || s.Off != int64(len(img.Bootstrap)) || s.Table != &a.Table {
		t.Errorf("first segment: %+v", s)
	}
	if s := img.Segments[1]; s.ID != b.Table.ID() || s.Off != img.Segments[0].End() {
		t.Errorf("second segment: %+v", s)
	}
	if img.Size() != img.Segments[1].End() {
		t.Errorf("size %d", img.Size())
	}
}

// The image depends on nothing but the arguments, and on all of them.
func TestDeterministic(t *testing.T) {
	layers := func() []*index.Layer { return []*index.Layer{manyFiles(1000), layerOf(file("x"))} }
	first := mustBuild(t, layers()...)
	if second := mustBuild(t, layers()...); !bytes.Equal(first.Bootstrap, second.Bootstrap) {
		t.Error("two bootstraps of the same layers differ")
	}
	other := layers()
	other[0].Table.Chunks = []index.Chunk{{Len: 1}}
	if bytes.Equal(uuid(first), uuid(mustBuild(t, other...))) {
		t.Error("same UUID with other content")
	}
}

func uuid(i *index.Image) []byte { return i.Bootstrap[1024+48 : 1024+64] }

func TestTooLarge(t *testing.T) {
	a, b := largeLayer(9<<40), largeLayer(9<<40+index.BlockSize)
	_, err := bootstrap.Build(manifest(), []*index.Layer{a, b})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "16 TiB") || !strings.Contains(err.Error(), b.Blob.String()) {
		t.Errorf("%v", err)
	}
}

// The kernel does not ask for an opaque mark on the root, so that overlayfs
// cannot be the judge.
func TestOpaqueRoot(t *testing.T) {
	low := layerOf(file("old"), index.Entry{Path: "", Kind: index.Dir, Mode: 0o700})
	high := layerOf(file("new"), index.Entry{Kind: index.Opaque})
	img := mustBuild(t, low, high)
	if bytes.Contains(img.Bootstrap, []byte("old")) || !bytes.Contains(img.Bootstrap, []byte("new")) {
		t.Error("the lower layer is still to be seen")
	}
}

func TestNoLayers(t *testing.T) {
	if img := mustBuild(t); len(img.Bootstrap) != index.BlockSize || img.Size() != index.BlockSize {
		t.Errorf("%d bytes", len(img.Bootstrap))
	}
}

// manyFiles makes a layer like a distribution's, n entries in directories of
// ten to a hundred.
func manyFiles(n int) *index.Layer {
	entries := make([]index.Entry, 0, n)
	for i := 0; len(entries) < n; i++ {
		dir := fmt.Sprintf("usr/share/package-%d/doc/section-%d", i%300, i)
		entries = append(entries, index.Entry{Path: dir, Kind: index.Dir, Mode: 0o755, Sec: 1_700_000_000})
		for k := 0; k < 10+i%90 && len(entries) < n; k++ {
			e := index.Entry{Path: fmt.Sprintf("%s/file-%d.html", dir, k), Kind: index.File, Mode: 0o644, Sec: 1_700_000_000, Size: int64(k * 1000)}
			if k%20 == 19 {
				e.Kind, e.Size, e.Link = index.Symlink, 0, "../index.html"
			}
			entries = append(entries, e)
		}
	}
	return layerOf(entries...)
}

func BenchmarkBuild(b *testing.B) {
	for _, n := range []int{100_000, 500_000} {
		l := manyFiles(n)
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				mustBuild(b, l)
			}
		})
	}
}
