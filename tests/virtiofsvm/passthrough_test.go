package virtiofsvm

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/tatami-containers/tatami/tests/vmtest"
)

// changes are what a guest does in a directory, and this machine in another one.
const changes = `umask 022
mkdir -p a/b/c empty; echo one > a/one; echo two >> a/one; (umask 077; echo secret > a/secret; mkdir a/private)
ln -s one a/link; ln -s /nowhere a/broken; ln a/one a/b/hard; mkfifo a/pipe; mknod a/null c 1 3
seq 20000 > a/numbers; dd if=a/numbers of=a/copy bs=1M 2>/dev/null; dd if=/dev/zero of=a/holes bs=1 count=0 seek=1000000 2>/dev/null
cp -a a b; mv b/one b/moved; mv b/b empty/; rm b/secret; rmdir b/private; truncate -s 5 b/copy
chmod 4755 b/moved; chmod 1777 empty; chown 12:34 b/numbers; chown -h 56:78 b/link; mkdir setgid; chown 0:99 setgid; chmod 2775 setgid; mkdir setgid/d; echo > setgid/f
exec 3> gone; rm gone; echo x >&3; exec 3>&-; i=0; while [ $i -lt 300 ]; do echo $i > empty/$i; i=$((i+1)); done; rm empty/1*; echo ok > empty/ok; mv -f empty/ok empty/2
`

// TestPassthrough lets a guest use a directory of the node as its own, with the
// options of Kata's runtime-rs.
func TestPassthrough(t *testing.T) {
	f := newFixture(t)
	if os.Getuid() != 0 {
		t.Skip("needs root, to make files of others and to mount")
	}
	must := func(errs ...error) {
		t.Helper()
		if err := errors.Join(errs...); err != nil {
			t.Fatal(err)
		}
	}
	plain := filepath.Join(filepath.Dir(f.dir), "plain")
	volume := filepath.Join(f.dir, "volume")
	must(os.Mkdir(plain, 0o755), os.Mkdir(filepath.Join(f.dir, "guest"), 0o755), os.Mkdir(volume, 0o755))
	buildPOSIX(t, filepath.Join(f.dir, "posixtest"))
	run(t, plain, "busybox", "sh", "-c", changes)
	makeShared(t, f.dir)

	d := serve(t, nil, "--passthrough", "--socket-path", f.socket, "--shared-dir", f.dir, "--cache", "auto", "--thread-pool-size=1", "-o", "announce_submounts", "--xattr")
	g := boot(t, f.socket, 1, true)
	g.sh(mountFS)
	// Volumes come when the machine runs.
	must(syscall.Mount("tmpfs", volume, "tmpfs", 0, ""))
	t.Cleanup(func() { must(syscall.Unmount(volume, syscall.MNT_DETACH)) })
	g.during(t, "changes", func(t *testing.T, g *guest) {
		g.sh("cd /fs/guest && { " + strings.ReplaceAll(strings.TrimSpace(changes), "\n", "; ") + "; }")
		want := run(t, plain, "busybox", "sh", "-c", describe)
		if got := g.sh("cd /fs/guest && " + describe); got != want {
			t.Errorf("the guest sees:\n%s\nwant:\n%s", got, want)
		}
		if got := run(t, filepath.Join(f.dir, "guest"), "busybox", "sh", "-c", describe); got != want {
			t.Errorf("the node sees:\n%s\nwant:\n%s", got, want)
		}
	})
	g.during(t, "images", func(t *testing.T, g *guest) {
		// What a guest can write is none of the node's images.
		if got := g.sh("ls -A /fs; ls -d /fs/.tatami 2>/dev/null || echo none"); got != "guest\nimage\nposixtest\nvolume\nnone\n" {
			t.Errorf("names: %q", got)
		}
		g.sh(mountImage)
		g.expectTree(f)
		g.sh("umount /mnt && " + losetup + " -D")
	})
	g.during(t, "mounts", func(t *testing.T, g *guest) {
		if got := strings.Fields(g.sh("echo volume > /fs/volume/f; stat -c %d /fs /fs/volume/f")); len(got) != 2 || got[0] == got[1] {
			t.Errorf("a mount on the node is not one in the guest: %q", got)
		}
		if b, err := os.ReadFile(filepath.Join(volume, "f")); err != nil || string(b) != "volume\n" {
			t.Errorf("%q, %v", b, err)
		}
	})
	g.during(t, "swapped links", func(t *testing.T, g *guest) { testSwappedLinks(t, f, g) })
	g.during(t, "POSIX", func(t *testing.T, g *guest) {
		out := g.try("mkdir /fs/posix; /fs/posixtest -test.v -test.timeout 5m -posixdir /fs/posix 2>&1; echo exit $?; rm -r /fs/posix")
		if !strings.HasSuffix(out, "exit 0\n") || !strings.Contains(out, "--- PASS: TestAll/XAttr") {
			t.Errorf("%s", out)
		}
	})
	g.during(t, "remount and reboot", func(t *testing.T, g *guest) {
		g.sh("sync; umount /fs && " + mountFS + " && grep -q two /fs/guest/a/one")
		g.sh("touch /tmp/before; (exec 3>>/fs/guest/a/one; sleep 1000 >/dev/null 2>&1 &)")
		c := g.start("reboot")
		defer c.Close()
		vmtest.WaitReady(t, g.VM, g.rebooted)
		g.sh(mountFS + " && grep -q two /fs/guest/a/one && echo more >> /fs/guest/a/one")
	})
	g.powerOff()
	d.ended(t)
}

// buildPOSIX makes a program for guests of go-fuse's POSIX tests.
func buildPOSIX(t *testing.T, path string) {
	t.Helper()
	cmd := exec.Command("go", "test", "-c", "-o", path, "github.com/hanwen/go-fuse/v2/posixtest")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("build the POSIX tests: %v: %s", err, out)
	}
}

// testSwappedLinks updates a secret as the kubelet does: a link in a volume is
// replaced.
func testSwappedLinks(t *testing.T, f *fixture, g *guest) {
	dir := filepath.Join(f.dir, "secret")
	var errs []error
	for _, v := range []string{"1", "2"} {
		errs = append(errs, os.MkdirAll(filepath.Join(dir, "..v"+v), 0o755), os.WriteFile(filepath.Join(dir, "..v"+v, "key"), []byte(v), 0o600))
	}
	errs = append(errs, os.Symlink("..v1", filepath.Join(dir, "..data")), os.Symlink("..data/key", filepath.Join(dir, "key")))
	if got := g.sh("cat /fs/secret/key"); got != "1" {
		t.Errorf("before: %q", got)
	}
	errs = append(errs, os.Symlink("..v2", filepath.Join(dir, "..new")), os.Rename(filepath.Join(dir, "..new"), filepath.Join(dir, "..data")), os.RemoveAll(filepath.Join(dir, "..v1")))
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	g.sh(`i=0; while [ "$(cat /fs/secret/key)" != 2 ]; do i=$((i+1)); [ $i -lt 200 ] || exit 1; sleep 0.05; done`)
}
