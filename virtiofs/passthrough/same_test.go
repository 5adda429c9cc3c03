package passthrough

import (
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// user runs a script in a directory as an ordinary user (or root), without the groups
// of the test.
func user(t *testing.T, dir string, uid, gid uint32, script string) string {
	t.Helper()
	// The shell changes the directory, not the fork: while that waits for a mount of
	// this process, the runtime has one processor less to serve it with.
	cmd := exec.CommandContext(t.Context(), "/bin/sh", "-c", `cd "$1" && eval "$2"`, "sh", dir, script)
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: gid}}
	out, err := cmd.CombinedOutput()
	if exit := new(exec.ExitError); err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	return fmt.Sprintf("%sexit %d\n", out, cmd.ProcessState.ExitCode())
}

// tree describes all that is below a directory.
func tree(t *testing.T, dir string) string {
	t.Helper()
	var b strings.Builder
	must(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(path, &st); err != nil {
			return err
		}
		name, err := filepath.Rel(dir, path)
		fmt.Fprintf(&b, "%s %o %d:%d", name, st.Mode, st.Uid, st.Gid)
		if !d.IsDir() {
			fmt.Fprintf(&b, " links %d size %d device %d", st.Nlink, st.Size, st.Rdev)
		}
		fmt.Fprintf(&b, " %s\n", contentOf(t, path, st.Mode))
		return err
	}))
	return b.String()
}

// contentOf is a link's target, or a file's bytes and attributes.
func contentOf(t *testing.T, path string, mode uint32) string {
	t.Helper()
	switch mode & unix.S_IFMT {
	case unix.S_IFLNK:
		target, err := os.Readlink(path)
		must(t, err)
		return target
	case unix.S_IFREG:
		data, err := os.ReadFile(path)
		must(t, err)
		names := make([]byte, 1024)
		n, err := unix.Listxattr(path, names)
		must(t, err)
		return fmt.Sprintf("%.20q %x %q", data, sha256.Sum256(data), names[:n])
	}
	return ""
}

// sameTable are scripts that run in two directories, one of them passed through, and
// have to say and do the same. A user's script follows root's in an open directory.
var sameTable = []struct{ name, root, user string }{
	{"files", "echo one > a; echo two >> a; cp a b; cat b; wc -c < a", "echo mine > c; cat a c; echo no > a"},
	{"masks", "umask 027; echo > f; mkdir d; umask 0; echo > g; mkdir -m 1777 sticky", "umask 077; echo > h; mkdir e; ln -s x l; mkfifo p"},
	{"permissions", "echo secret > s; chmod 600 s; mkdir -m 700 d; echo > d/f", "cat s; ls d; cat d/f; rm s; chmod 644 s; rmdir d"},
	{"sticky directory", "mkdir -m 1777 d; echo > d/root", "rm -f d/root; mv d/root d/x; echo > d/mine; rm d/mine"},
	{"setgid directory", "mkdir d; chgrp 2000 d; chmod 2777 d; echo > d/f; mkdir d/sub",
		"echo > d/mine; mkdir d/dir; umask 0; install -m 2755 /dev/null d/prog; mkdir -m 2770 d/special"},
	{"setuid cleared by writes", "for f in a b c d; do echo > $f; chmod 6777 $f; done; chown 1000 d; chmod 6777 d; echo > c",
		"echo x >> a; : > b; truncate -s 100 d; stat -c %a a b c d"},
	{"setuid kept by root", "echo > a; chmod 4755 a; echo x >> a; truncate -s 3 a; chown 1000 a; stat -c %a a", ""},
	{"owners", "echo > f; chown 1000:1000 f; mkdir d; chown 5:6 d; ln -s f l; chown -h 7:8 l", "chgrp 1000 f; chown 0 f; echo > mine; chgrp 5 mine"},
	{"modes", "echo > f; for m in 0 4755 2755 1644 777; do chmod $m f; stat -c %a f; done", "echo > g; chmod 2755 g; stat -c %a g"},
	{"links", "echo x > a; ln a b; ln -s a c; ln c d; stat -c %h a; echo y > b; cat a c; rm a; cat b; cat c; readlink c", "ln b e; ln -s /etc/passwd p; readlink p"},
	{"renames", "echo 1 > a; echo 2 > b; mv a b; cat b; mkdir d e; mv b d; mv -T d e; ls e; mv nothing x; mkdir d; mv -T e d; mv d d/sub", ""},
	{"rename flags", "echo 1 > a; echo 2 > b; mv -n a b; cat a b; mv --exchange a b 2>/dev/null; cat a b", ""},
	{"removal", "mkdir -p d/e; touch d/f; rmdir d; rm d; rm d/f; rmdir d/e d; rm nothing; rmdir nothing; touch f; rmdir f", "rm f"},
	{"devices", "mknod null c 1 3; mknod disk b 8 300; mkfifo p; stat -c '%F %t %T' null disk p", "mknod zero c 1 5; mkfifo q"},
	{"times", "touch -d '1999-01-02 03:04:05.123456789' a; touch -ma -d @-5 b; stat -c '%x %y' a; stat -c %Y b; ln -s a l; touch -h -d @7 l; stat -c %Y l", "touch a; touch -d @9 a"},
	{"holes", "truncate -s 10M a; echo x | dd of=a bs=1 seek=5000000 conv=notrunc 2>/dev/null; cp --sparse=auto a b; cmp a b; fallocate -p -o 0 -l 4096 a; fallocate -l 20000000 c; stat -c %s a b c", ""},
	{"appending", "for i in 1 2 3 4 5; do (for j in 1 2 3 4 5 6 7 8; do echo line >> log; done) & done; wait; wc -l < log", ""},
	{"names", "touch ' ' '\n' -- -x \"$(printf %255s x)\"; touch \"$(printf %256s x)\"; touch ''; mkdir ...; ls -A | wc -l", ""},
	{"many names", "mkdir d; (cd d; seq 1000 | xargs touch); ls d | wc -l; ls -l d | sort | uniq | wc -l; rm -r d; ls", ""},
	{"open and removed", "exec 3<>f; echo kept >&3; rm f; echo more >&3; cat < /dev/fd/3 2>/dev/null; cat /proc/self/fd/3; stat -L -c '%h %s' /proc/self/fd/3; mkdir d; cd d; rmdir ../d; touch x; ls", ""},
	{"long targets", "ln -s \"$(printf %4095s x)\" l; readlink l | wc -c; ln -s \"$(printf %4096s x)\" m", ""},
	{"large", "seq 100000 > a; sha256sum < a; dd if=a of=b bs=1M 2>/dev/null; cmp a b; dd if=a of=c bs=7777 2>/dev/null; cmp a c", ""},
	{"swapped links", "mkdir v1 v2; echo 1 > v1/key; echo 2 > v2/key; ln -s v1 data; ln -s data/key key; cat key; ln -s v2 new; mv -T new data; cat key", ""},
}

func TestSame(t *testing.T) {
	for _, cache := range []Cache{CacheNever, CacheAlways} {
		t.Run(string(cache), func(t *testing.T) {
			host, guest := mount(t, Options{Cache: cache, XAttr: true}, 0)
			plain := filepath.Join(filepath.Dir(host), "plain")
			must(t, os.Chmod(filepath.Dir(filepath.Dir(host)), 0o755), os.Mkdir(plain, 0o755))
			for _, tc := range sameTable {
				t.Run(tc.name, func(t *testing.T) { same(t, plain, host, guest, tc.root, tc.user) })
			}
		})
	}
}

func same(t *testing.T, plain, host, guest, root, other string) {
	var said [2]string
	for i, dir := range []string{plain, guest} {
		it := filepath.Join(dir, "it")
		must(t, os.Mkdir(it, 0o777), os.Chmod(it, 0o777))
		said[i] = user(t, it, 0, 0, root)
		if other != "" {
			said[i] += user(t, it, 1000, 1000, other)
		}
	}
	if said[0] != said[1] {
		t.Errorf("on the node:\n%s\nin the guest:\n%s", said[0], said[1])
	}
	want := tree(t, filepath.Join(plain, "it"))
	for name, dir := range map[string]string{"guest": guest, "node": host} {
		if got := tree(t, filepath.Join(dir, "it")); got != want {
			t.Errorf("seen by the %s:\n%s\nwant:\n%s", name, got, want)
		}
	}
	must(t, os.RemoveAll(filepath.Join(plain, "it")), os.RemoveAll(filepath.Join(guest, "it")))
	if left, err := os.ReadDir(host); err != nil || len(left) != 0 {
		t.Errorf("left on the node: %v, %v", left, err)
	}
}

// With HANDLE_KILLPRIV_V2 the node clears the bits that a writer may not keep.
func TestKillPriv(t *testing.T) {
	host, guest := mount(t, Options{Cache: CacheNever, XAttr: true}, fuse.CAP_HANDLE_KILLPRIV_V2|fuse.CAP_ATOMIC_O_TRUNC)
	must(t, os.Chmod(filepath.Dir(filepath.Dir(host)), 0o755), os.Chmod(guest, 0o777))
	user(t, guest, 0, 0, "for f in a b c d e; do echo > $f; chmod 6777 $f; done; chown 1000 d; chmod 6777 d; echo x >> e")
	said := user(t, guest, 1000, 1000, "echo x >> a; : > b; truncate -s 100 c; echo x >> d")
	got := user(t, host, 0, 0, "stat -c %a a b c d e")
	if want := "777\n777\n777\n777\n6777\nexit 0\n"; got != want || said != "exit 0\n" {
		t.Errorf("modes are %s, the user heard %q", got, said)
	}
}

func TestReadOnly(t *testing.T) {
	host, guest := mount(t, Options{ReadOnly: true, XAttr: true}, 0)
	user(t, host, 0, 0, "echo x > a; mkdir d; ln -s a l")
	want := tree(t, host)
	for _, script := range []string{"echo y > a", "echo y >> a", "truncate -s 0 a", "rm a", "mv a b", "ln a b", "ln -s a b", "mkdir b", "rmdir d",
		"mkfifo p", "chmod 600 a", "chown 5 a", "touch -d @5 a", "touch new"} {
		if got := user(t, guest, 0, 0, script); !strings.Contains(got, "Read-only file system") {
			t.Errorf("%s: %s", script, got)
		}
	}
	if err := unix.Setxattr(filepath.Join(guest, "a"), "user.x", nil, 0); !errors.Is(err, unix.EROFS) {
		t.Errorf("set attribute: %v", err)
	}
	if got := tree(t, guest); got != want || tree(t, host) != want {
		t.Errorf("the guest sees\n%s\nwant\n%s", got, want)
	}
}
