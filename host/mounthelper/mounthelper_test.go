package mounthelper

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/volume"
)

func record(t *testing.T) string {
	t.Helper()
	o, err := volume.NewGuestPull("docker.io/library/debian:12").Option()
	if err != nil {
		t.Fatal(err)
	}
	return o
}

func TestParse(t *testing.T) {
	for name, c := range map[string]struct {
		args  []string
		data  string
		flags uintptr
		wrong bool
	}{
		"as mount.fuse calls it": {
			args: []string{"overlay", "/t", "-o", "rw,workdir=/w,upperdir=/u,lowerdir=/l," + record(t) + ",dev,suid"},
			data: "workdir=/w,upperdir=/u,lowerdir=/l",
		},
		"read-only":      {args: []string{"overlay", "/t", "-o", "ro,lowerdir=/a:/b,nodev"}, data: "lowerdir=/a:/b", flags: unix.MS_RDONLY | unix.MS_NODEV},
		"options twice":  {args: []string{"overlay", "/t", "-o", "lowerdir=/a", "-o", "index=off"}, data: "lowerdir=/a,index=off"},
		"escaped comma":  {args: []string{"overlay", "/t", "-o", `lowerdir=/a\,b,extraoption=x`}, data: `lowerdir=/a\,b`},
		"no options":     {args: []string{"overlay", "/t"}, wrong: true},
		"no lower":       {args: []string{"overlay", "/t", "-o", "upperdir=/u"}, wrong: true},
		"no target":      {args: []string{"overlay", "-o", "lowerdir=/a"}, wrong: true},
		"relative":       {args: []string{"overlay", "t", "-o", "lowerdir=/a"}, wrong: true},
		"another source": {args: []string{"/dev/sda", "/t", "-o", "lowerdir=/a"}, wrong: true},
		"no text":        {args: []string{"overlay", "/t", "-o"}, wrong: true},
	} {
		t.Run(name, func(t *testing.T) {
			r, err := parse(c.args)
			if c.wrong {
				if !errdefs.IsInvalidArgument(err) {
					t.Errorf("parsed %+v, error %v", r, err)
				}
				return
			}
			if err != nil || r.target != "/t" || r.data != c.data || r.flags != c.flags {
				t.Errorf("parsed %+v (%v), want data %q, flags %x", r, err, c.data, c.flags)
			}
		})
	}
}

func TestMount(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts overlay")
	}
	dir := t.TempDir()
	if err := unix.Mount("tmpfs", dir, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(dir, unix.MNT_DETACH) })
	for _, name := range []string{"l/etc", "u", "w", "t"} {
		if err := os.MkdirAll(filepath.Join(dir, name), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "l/etc/passwd"), []byte("app:x:7:7::/:/bin/sh\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	target := filepath.Join(dir, "t")
	options := "workdir=" + dir + "/w,upperdir=" + dir + "/u,lowerdir=" + dir + "/l," + record(t)
	if err := Main([]string{"overlay", target, "-o", options}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Unmount(target, unix.MNT_DETACH) })
	if b, err := os.ReadFile(filepath.Join(target, "etc/passwd")); err != nil || len(b) == 0 {
		t.Errorf("read %q: %v", b, err)
	}
	if err := os.WriteFile(filepath.Join(target, "new"), nil, 0o644); err != nil {
		t.Error(err)
	}
}
