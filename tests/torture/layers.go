package torture

import (
	"archive/tar"
	"fmt"
	"strings"
)

// Many is how many files a large directory of Layers has: enough for many
// blocks, and few enough for an emulated machine.
const Many = 1000

// Layers are tars to be laid over each other, the first one lowest. Unpackers
// agree on what they show: see Divergent for what they do not agree on.
func Layers() [][]byte {
	return [][]byte{base(), changes(), again()}
}

// Divergent are layers on which the overlay unpacking of containerd differs
// from an unpacker that works in the merged tree: parents that are symlinks of
// a lower layer, markers in directories that are not there, parents that are
// files of a lower layer, parents without an entry.
func Divergent() [][]byte {
	low, high := NewTar(), NewTar()
	low.Dir("usr")
	low.Dir("usr/lib", Mode(0o700), Own(5, 6), Attr("user.kept", "x"), At(1000, 5))
	low.File("usr/lib/old", "old")
	low.Symlink("lib", "usr/lib")
	low.Symlink("deep", "lib")
	low.File("file", "not a directory")
	low.Symlink("loop", "loop")

	high.File("lib/new", "in a directory that replaces the symlink")
	high.File("deep/x/y", "attributes through two symlinks")
	high.File("file/.wh.x", "")
	high.File("missing/.wh.x", "")
	high.File("absent/.wh..wh..opq", "")
	high.File("loop/x", "")
	high.File("fresh/deep/file", "no parents")
	return [][]byte{low.Bytes(), high.Bytes()}
}

// Large is a layer with one directory of n files.
func Large(n int) []byte {
	t := NewTar()
	t.Dir("large")
	for i := range n {
		t.File(fmt.Sprintf("large/entry-%d", (i*7919)%n), "")
	}
	return t.Bytes()
}

func base() []byte {
	t := NewTar()
	t.Dir(".", Mode(0o755), At(1_600_000_000, 1))
	for _, d := range []string{"etc", "bin", "var", "var/lib", "names", "links", "dev", "times", "swap", "gone", "opaque", "opaque/sub", "kept"} {
		t.Dir(d)
	}
	contents(t)
	attributes(t)
	names(t)
	links(t)
	shapes(t)
	lower(t)
	return t.Bytes()
}

// contents has sizes around the block and the unit of verification.
func contents(t *Tar) {
	t.Dir("data")
	for _, n := range []int{0, 1, 511, 4095, 4096, 4097, 65535, 65536, 65537, 200_001} {
		t.Random(fmt.Sprintf("data/random-%d", n), n)
	}
	t.File("data/zeros", strings.Repeat("\x00", 300_000))
	t.File("data/holes", strings.Repeat("\x00", 70_000)+"middle"+strings.Repeat("\x00", 150_000)+"end")
}

// ACLs in the kernel's form: version 2, then tag, permissions and id of each
// element; user::rwx user:7:r-x group::r-x mask::r-x other::--- and so on.
const (
	aclAccess = "\x02\x00\x00\x00" +
		"\x01\x00\x07\x00\xff\xff\xff\xff" + "\x02\x00\x05\x00\x07\x00\x00\x00" +
		"\x04\x00\x05\x00\xff\xff\xff\xff" + "\x10\x00\x05\x00\xff\xff\xff\xff" + "\x20\x00\x00\x00\xff\xff\xff\xff"
	aclDefault = "\x02\x00\x00\x00" +
		"\x01\x00\x07\x00\xff\xff\xff\xff" + "\x04\x00\x05\x00\xff\xff\xff\xff" + "\x20\x00\x05\x00\xff\xff\xff\xff"
	// Version 2, effective, permitted cap_net_bind_service.
	capability = "\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00"
)

func attributes(t *Tar) {
	t.Dir("attr", Mode(0o1777))
	t.File("attr/suid", "#!", Mode(0o4755))
	t.File("attr/sgid", "#!", Mode(0o2711))
	t.File("attr/none", "", Mode(0))
	t.Dir("attr/sgid-dir", Mode(0o2775), Own(0, 50))
	t.File("attr/owner", "", Own(4_000_000_000, 70_000))
	t.File("attr/cap", "x", Attr("security.capability", capability))
	t.File("attr/user", "x", Attr("user.a", "1"), Attr("user.b", ""), Attr("user.long."+strings.Repeat("n", 245), "v"))
	t.Random("attr/large", 5000, Attr("user.large", strings.Repeat("v", 60_000)), Attr("user.more", strings.Repeat("w", 3000)))
	t.File("attr/acl", "x", Mode(0o750), Attr("system.posix_acl_access", aclAccess))
	t.Dir("attr/acl-dir", Mode(0o750), Attr("system.posix_acl_access", aclAccess), Attr("system.posix_acl_default", aclDefault))
	t.Dir("attr/large-dir", Attr("user.large", strings.Repeat("d", 4050)))
	t.File("attr/large-dir/x", "x")
	t.Symlink("attr/link-attr", "x", Attr("security.note", strings.Repeat("s", 4000)))
	for i, at := range []Option{At(0, 0), At(-1, 1), At(-2_000_000_000, 0), At(1<<31, 999_999_999), At(5_000_000_000, 5)} {
		t.File(fmt.Sprintf("times/%d", i), "", at)
	}
	t.Dir("times/dir", At(-86400, 0))
	t.Symlink("times/link", "x", At(1<<33, 0))
	t.Device(tar.TypeChar, "dev/null", 1, 3, Mode(0o666))
	t.Device(tar.TypeChar, "dev/minor", 10, 70_000)
	t.Device(tar.TypeBlock, "dev/block", 259, 1<<20-1)
	t.Device(tar.TypeChar, "dev/zero-minor", 4095, 0)
	t.Device(tar.TypeFifo, "dev/pipe", 0, 0, Own(1, 2))
}

// names has what sorts around the dots, is not text, or is as long as can be.
func names(t *Tar) {
	for _, n := range []string{
		"+x", "-x", "!x", " ", "#", ".+", "...", "..x", ".a", "a", "a-b", "a.b", "ab", "~",
		"new\nline", "tab\t", `back\slash`, "\u00fc", "\xff\xfe", "\x01", strings.Repeat("l", 255), "wh.x", "x.wh.y",
	} {
		t.File("names/"+n, n)
	}
	t.Dir("names/dir")
	t.File("names/dir/x", "a directory between its siblings")
	t.File("names/dir-", "sorts before what is in the directory")
	deep := strings.TrimSuffix(strings.Repeat("d/", 100), "/")
	for i := 1; i <= len(deep); i += 2 {
		t.Dir(deep[:i])
	}
	t.File(deep+"/bottom", "deep")
}

func links(t *Tar) {
	t.Symlink("links/short", "x")
	t.Symlink("links/absolute", "/etc/../etc/passwd")
	t.Symlink("links/odd", "a//b/./ \n\u00fc/")
	t.Symlink("links/binary", "\xfe\xff")
	for _, n := range []int{63, 64, 4031, 4032, 4033, 4095} { // 4032 is what fits behind an inode
		t.Symlink(fmt.Sprintf("links/long-%d", n), strings.Repeat("t", n))
	}
	t.Random("links/one", 10_000, Mode(0o751), Attr("user.shared", "yes"))
	t.Link("links/two", "links/one")
	t.Link("var/three", "links/two")
	t.Symlink("links/sym", "target")
	t.Link("links/sym2", "links/sym")
	t.Device(tar.TypeFifo, "links/pipe", 0, 0)
	t.Link("links/pipe2", "./links/pipe")
	t.Device(tar.TypeChar, "links/node", 5, 1)
	t.Link("links/node2", "/links/node")
}

// shapes has directories of sizes around what fits behind an inode and into a
// block, and large ones.
func shapes(t *Tar) {
	t.Dir("shapes")
	// With "." and ".." 27 bytes are taken; 4032 fit behind the inode.
	for i, fill := range []int{4031, 4032, 4033, 4095, 4096, 4097, 8192, 8193} {
		d := fmt.Sprintf("shapes/%d", i)
		t.Dir(d)
		for n, left := 0, fill-27; left > 0; n++ {
			size := min(left, 12+200)
			if rest := left - size; rest > 0 && rest < 12+8 {
				size -= 20 // leave room for a last name
			}
			name := fmt.Sprintf("%03d%s", n, strings.Repeat("n", size-12-3))
			t.File(d+"/"+name, "")
			left -= size
		}
	}
	t.Dir("shapes/many")
	for i := range Many {
		t.File(fmt.Sprintf("shapes/many/entry-%d", (i*7919)%Many), "")
	}
	t.Dir("shapes/empty")
	t.Dir("shapes/dirs")
	for i := range 300 {
		t.Dir(fmt.Sprintf("shapes/dirs/%d", i))
	}
}

// lower is what the next layers change.
func lower(t *Tar) {
	t.File("gone/file", "x")
	t.Dir("gone/dir")
	t.File("gone/dir/inside", "x")
	t.Dir("gone/remade")
	t.File("gone/remade/old", "x")
	t.Dir("gone/remade2", Mode(0o700))
	t.File("gone/remade2/old", "x")
	t.File("gone/linked", "hard")
	t.Link("kept/linked", "gone/linked")
	t.Link("kept/linked2", "gone/linked")
	for _, n := range []string{"+old", "-old", ".old", "old", "sub/old"} {
		t.File("opaque/"+n, "hidden")
	}
	t.Dir("opaque/late")
	t.File("opaque/late/old", "hidden")
	t.Dir("opaque/implied", Mode(0o711), Own(3, 4), Attr("user.dir", "kept"), At(900, 9))
	t.File("opaque/implied/old", "hidden")
	t.File("swap/file-dir", "x")
	t.Dir("swap/dir-file")
	t.File("swap/dir-file/x", "x")
	t.Dir("swap/dir-link")
	t.File("swap/dir-link/x", "x")
	t.Symlink("swap/link-dir", "dir-file")
	t.Symlink("swap/link-file", "nowhere")
	t.File("swap/file-link", "x")
	t.Device(tar.TypeFifo, "swap/pipe-file", 0, 0)
	t.Dir("swap/back")
	t.File("swap/back/first", "must not come back")
	t.Dir("meta", Mode(0o755), Attr("user.before", "1"))
	t.File("meta/inside", "stays")
	t.Dir("implied", Mode(0o700), Own(11, 12), Attr("user.keep", "me"), At(800, 8))
	t.Dir("implied/sub", Mode(0o2750), At(801, 8))
	t.File("implied/sub/old", "stays")
	t.File("lower-file", "linked from above", Attr("user.x", "y"))
	t.Symlink("lower-link", "lower-file")
}

func changes() []byte {
	t := NewTar()
	t.File("gone/.wh.file", "")
	t.File("gone/.wh.dir", "")
	t.File("gone/.wh.linked", "")
	t.File("gone/.wh.never-was", "")
	t.File("gone/.wh.remade", "") // before the directory
	t.Dir("gone/remade", Mode(0o711))
	t.File("gone/remade/new", "new")
	t.Dir("gone/remade2") // and behind it
	t.File("gone/remade2/new", "new")
	t.File("gone/.wh.remade2", "")

	t.Dir("opaque", Mode(0o750))
	t.File("opaque/+new", "sorts before the marker")
	t.File("opaque/.wh..wh..opq", "")
	t.File("opaque/new", "behind the marker")
	t.Dir("opaque/late")
	t.File("opaque/late/new", "new")
	t.File("opaque/implied/new", "new")

	t.Dir("swap/file-dir")
	t.File("swap/file-dir/x", "x")
	t.File("swap/dir-file", "now a file")
	t.Symlink("swap/dir-link", "file-dir")
	t.Dir("swap/link-dir")
	t.File("swap/link-dir/x", "x")
	t.File("swap/link-file", "x")
	t.Symlink("swap/file-link", "x")
	t.File("swap/pipe-file", "x")
	t.File("swap/back", "a file for one layer")
	t.Dir("meta", Mode(0o1700), Own(9, 9), Attr("user.after", "2"), At(700, 7))
	t.File("implied/sub/new", "no entry for the parents")

	t.Link("links/lower", "lower-file")
	t.Link("links/lower-link", "lower-link")
	t.File("links/two", "no longer linked")
	t.Random("own", 70_000)
	t.Link("own2", "own")
	t.File("own3", "first")
	t.Link("own4", "own3")
	t.File("own3", "second, on its own")
	t.File("twice", "first")
	t.File("twice", "second", Mode(0o600))
	t.Dir("releases")
	t.Dir("releases/1")
	t.Symlink("releases/current", "/releases/1")
	t.File("releases/current/app", "through a symlink of this layer")
	t.Symlink("releases/up", "../releases/current")
	t.Link("releases/linked", "releases/up/app")
	return t.Bytes()
}

func again() []byte {
	t := NewTar()
	t.Dir(".", Mode(0o751), Own(1, 1), At(1_650_000_000, 3))
	t.Dir("swap/back", Mode(0o700))
	t.File("swap/back/second", "the only one")
	t.Dir("gone/dir")
	t.File("gone/dir/other", "the only one")
	t.File("gone/file", "back")
	t.File("kept/.wh.linked2", "")
	t.File("opaque/late/.wh..wh..opq", "")
	t.File("opaque/late/third", "the only one")
	t.File(".wh.times", "")
	t.File("shapes/many/.wh.entry-77", "")
	t.File("shapes/many/added", "x")
	t.File("names/.wh.\xff\xfe", "")
	t.Symlink("swap/file-dir", "elsewhere")
	t.Random("data/random-4097", 8193)
	return t.Bytes()
}
