package passthrough

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// What a guest's overlayfs keeps in trusted.* lies on the node under names of its own,
// which the guest cannot use in another way; what the node has there is not shown.
func TestTrusted(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("f", filepath.Join(dir, "l")); err != nil {
		t.Fatal(err)
	}
	if err := unix.Setxattr(file, "user.virtiofs.other", []byte("node"), 0); err != nil {
		t.Skip("needs user attributes in the directory for temporary files:", err)
	}
	node := func(trusted bool, name string) (*FS, fuse.InHeader) {
		root, err := os.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		defer root.Close()
		f, err := New(root, Options{XAttr: true, Trusted: trusted})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			if err := f.Close(); err != nil {
				t.Error(err)
			}
		})
		var out fuse.EntryOut
		if st := f.Lookup(nil, &fuse.InHeader{NodeId: fuse.FUSE_ROOT_ID}, name, &out); !st.Ok() {
			t.Fatal(st)
		}
		return f, fuse.InHeader{NodeId: out.NodeId}
	}
	f, in := node(true, "f")
	set := func(f *FS, in fuse.InHeader, name, value string) fuse.Status {
		return f.SetXAttr(nil, &fuse.SetXAttrIn{InHeader: in, Size: uint32(len(value))}, name, []byte(value))
	}
	const name = "trusted.overlay.opaque"
	if st := set(f, in, name, "y"); !st.Ok() {
		t.Fatal(st)
	}
	buf := make([]byte, 4096)
	if n, err := unix.Getxattr(file, "user.virtiofs."+name, buf); err != nil || string(buf[:n]) != "y" {
		t.Errorf("on the node: %q, %v", buf[:max(n, 0)], err)
	}
	if n, st := f.GetXAttr(nil, &in, name, buf); !st.Ok() || string(buf[:n]) != "y" {
		t.Errorf("in the guest: %q, %v", buf[:n], st)
	}
	if n, st := f.ListXAttr(nil, &in, buf); !st.Ok() || string(buf[:n]) != name+"\x00" {
		t.Errorf("listed: %q, %v", buf[:n], st)
	}
	for _, n := range []string{"user.virtiofs." + name, "user.virtiofs.other", "user.virtiofs."} {
		if st := set(f, in, n, "x"); st != fuse.EPERM {
			t.Errorf("set %s: %v", n, st)
		}
		if _, st := f.GetXAttr(nil, &in, n, buf); st != fuse.ENODATA {
			t.Errorf("get %s: %v", n, st)
		}
	}
	if st := set(f, in, "trusted."+strings.Repeat("n", maxName-len("trusted.")), "x"); st != fuse.Status(unix.ERANGE) {
		t.Errorf("long name: %v", st)
	}
	if lf, link := node(true, "l"); set(lf, link, name, "y") != fuse.EPERM {
		t.Error("a link may have one, or no file may")
	}
	plain, in := node(false, "f")
	if st := set(plain, in, name, "y"); st != fuse.EPERM {
		t.Errorf("without Trusted: %v", st)
	}
	if st := f.RemoveXAttr(nil, &in, name); !st.Ok() {
		t.Error(st)
	}
	if _, err := unix.Getxattr(file, "user.virtiofs."+name, buf); !errors.Is(err, unix.ENODATA) {
		t.Errorf("removed: %v", err)
	}
}
