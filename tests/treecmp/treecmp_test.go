package treecmp

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// plant makes a small tree that has one of everything.
func plant(t *testing.T) string {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: device nodes and trusted attributes")
	}
	root := t.TempDir()
	at := func(name string) string { return filepath.Join(root, name) }
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(os.Mkdir(at("d"), 0o755))
	must(os.WriteFile(at("d/f"), []byte("content"), 0o644))
	must(os.Link(at("d/f"), at("hard")))
	must(os.WriteFile(at("plain"), []byte("other"), 0o600))
	must(os.Symlink("d/f", at("link")))
	must(unix.Mknod(at("dev"), unix.S_IFCHR|0o600, int(unix.Mkdev(1, 3))))
	must(unix.Mknod(at("fifo"), unix.S_IFIFO|0o600, 0))
	must(unix.Lsetxattr(at("plain"), "user.big", make([]byte, 2000), 0))
	must(unix.Lsetxattr(at("d"), "trusted.overlay.opaque", []byte("y"), 0))
	for _, name := range []string{".", "d", "d/f", "plain", "link", "dev", "fifo"} {
		setTime(t, at(name), 1_500_000_000, 42)
	}
	return root
}

func setTime(t *testing.T, path string, sec, nsec int64) {
	t.Helper()
	ts := []unix.Timespec{{Sec: sec, Nsec: nsec}, {Sec: sec, Nsec: nsec}}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, path, ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		t.Fatal(err)
	}
}

func snap(t *testing.T, root string) Tree {
	t.Helper()
	tree, err := Snapshot(root)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func TestSnapshot(t *testing.T) {
	tree := snap(t, plant(t))
	if len(tree) != 8 {
		t.Fatalf("%d names, want 8: %v", len(tree), tree)
	}
	if got := tree["hard"]; got.Group != "d/f" || got.Nlink != 2 || got.Size != 7 || got.Sum != tree["d/f"].Sum {
		t.Errorf("hard link: %+v", got)
	}
	if got := tree["link"].Link; got != "d/f" {
		t.Errorf("symlink target %q", got)
	}
	if got := tree["dev"].Rdev; got != unix.Mkdev(1, 3) {
		t.Errorf("rdev %#x", got)
	}
	if got := tree["plain"].Xattrs["user.big"]; len(got) != 2000 {
		t.Errorf("attribute of %d bytes", len(got))
	}
	if got := tree["d"]; len(got.Xattrs) != 0 || got.Sec != 1_500_000_000 || got.Nsec != 42 {
		t.Errorf("directory: %+v", got)
	}
}

// Every attribute has to be looked at: change one at a time.
func TestDiff(t *testing.T) {
	tests := []struct {
		field  Field
		change func(root string) error
	}{
		{Mode, func(r string) error { return os.Chmod(r+"/d/f", 0o600) }},
		{Owner, func(r string) error { return os.Lchown(r+"/link", 0, 7) }},
		{Group, func(r string) error { return os.Rename(r+"/hard", r+"/a") }},
		{Nlink, func(r string) error { return os.Link(r+"/fifo", r+"/fifo2") }},
		{Mtime, func(r string) error { return os.Chtimes(r+"/plain", time.Unix(0, 0), time.Unix(0, 0)) }},
		{Rdev, func(r string) error {
			return replace(r+"/dev", func(p string) error { return unix.Mknod(p, unix.S_IFCHR|0o600, 5) })
		}},
		{Xattrs, func(r string) error { return unix.Lsetxattr(r+"/d/f", "user.new", []byte("x"), 0) }},
		{"user.big", func(r string) error { return unix.Lsetxattr(r+"/plain", "user.big", []byte("x"), 0) }},
		{Link, func(r string) error {
			return replace(r+"/link", func(p string) error { return os.Symlink("d/g", p) })
		}},
		{Size, func(r string) error { return os.Truncate(r+"/plain", 100) }},
		{Content, func(r string) error { return os.WriteFile(r+"/plain", []byte("OTHER"), 0) }},
		{"only in the first", func(r string) error { return os.Remove(r + "/fifo") }},
		{"only in the second", func(r string) error { return os.Mkdir(r+"/new", 0o755) }},
	}
	for _, tt := range tests {
		t.Run(string(tt.field), func(t *testing.T) {
			root := plant(t)
			before := snap(t, root)
			if d := Diff(before, snap(t, root)); d != nil {
				t.Fatalf("two snapshots of one tree differ: %v", d)
			}
			if err := tt.change(root); err != nil {
				t.Fatal(err)
			}
			if d := strings.Join(Diff(before, snap(t, root)), "\n"); !strings.Contains(d, string(tt.field)) {
				t.Errorf("the change was not seen: %q", d)
			}
			if d := strings.Join(Diff(before, snap(t, root), tt.field), "\n"); strings.Contains(d, ": "+string(tt.field)+":") {
				t.Errorf("the field was not ignored: %q", d)
			}
		})
	}
}

func replace(path string, create func(string) error) error {
	if err := os.Remove(path); err != nil {
		return err
	}
	return create(path)
}
