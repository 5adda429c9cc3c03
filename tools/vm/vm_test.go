package vm

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
)

// fakeKernel has what the boot protocol says of a bzImage's release.
func fakeKernel(text string) []byte {
	b := make([]byte, 0x400)
	copy(b[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(b[0x20e:], 0x300-0x200)
	copy(b[0x300:], text)
	return b
}

// tree makes a kernel as a package unpacks it.
func tree(t *testing.T, release string, modules bool) (image string) {
	t.Helper()
	root := filepath.Join(t.TempDir(), release)
	image = filepath.Join(root, "boot/vmlinuz-"+release)
	dirs := []string{filepath.Dir(image)}
	if modules {
		dirs = append(dirs, filepath.Join(root, "lib/modules", release))
	}
	for _, dir := range dirs {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(image, fakeKernel(release+" (builder) #1\x00"), 0o644); err != nil {
		t.Fatal(err)
	}
	return image
}

func TestFindKernel(t *testing.T) {
	image := tree(t, "99.1.2-test", true)
	k, err := FindKernel(image)
	if err != nil || k.Image != image || k.Release != "99.1.2-test" || !strings.HasSuffix(k.Modules, "lib/modules/99.1.2-test") {
		t.Errorf("got %+v, %v", k, err)
	}
	if _, err := FindKernel(tree(t, "99.1.3-test", false)); !errdefs.IsNotFound(err) {
		t.Errorf("without modules: %v, want ErrNotFound", err)
	}
	if _, err := FindKernel("/etc/passwd"); err == nil {
		t.Error("a text file was taken for a kernel")
	}
}

func TestFindKernelInCache(t *testing.T) {
	if names, err := filepath.Glob("/boot/vmlinuz-*"); err != nil || len(names) > 0 {
		t.Skipf("needs a machine without kernels in /boot, which come first: %q, %v", names, err)
	}
	cache := t.TempDir()
	t.Setenv("XDG_CACHE_HOME", cache)
	if _, err := FindKernel(""); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "fetch-kernel") {
		t.Errorf("empty cache: %v, want ErrNotFound with the remedy", err)
	}
	dir := filepath.Join(cache, "tatami/kernel")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, release := range []string{"6.9.1", "6.12.1", "6.12.0"} {
		root := filepath.Dir(filepath.Dir(tree(t, release, true)))
		if err := os.Rename(root, filepath.Join(dir, release)); err != nil {
			t.Fatal(err)
		}
	}
	if k, err := FindKernel(""); err != nil || k.Release != "6.12.1" {
		t.Errorf("got %+v, %v; want the newest", k, err)
	}
}

func TestCompareReleases(t *testing.T) {
	order := []string{"5.10.0-9", "6.1.0-56-cloud-amd64", "6.9.12", "6.12", "6.12.95+deb12-cloud-amd64", "6.18.35", "10.0"}
	shuffled := slices.Clone(order)
	slices.Sort(shuffled)
	slices.SortFunc(shuffled, compareReleases)
	if !slices.Equal(shuffled, order) {
		t.Errorf("order is %q", shuffled)
	}
}

func FuzzReadRelease(f *testing.F) {
	f.Add(fakeKernel("6.1.0 (x)"))
	f.Add([]byte("HdrS"))
	f.Fuzz(func(t *testing.T, b []byte) {
		if r, err := readRelease(bytes.NewReader(b)); err == nil && (r == "" || strings.Contains(r, "/")) {
			t.Errorf("release %q", r)
		}
	})
}

func TestArgs(t *testing.T) {
	cfg := Config{Kernel: Kernel{Image: "/k", Release: "6.1.0"}, Initrd: "/i", Cmdline: "extra=1", Network: true, CID: 9, Args: []string{"-snapshot"}}
	if err := cfg.complete(); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name, release string
		accel         Accel
		vsock         Vsock
		want, not     []string
	}{
		{"emulated", "6.1.0", AccelTCG, VsockVhostUser, []string{"-cpu max", "tcg,thread=multi", "path=/d,,x/vmm", "vhost-user-vsock-pci",
			"extra=1", "-no-reboot", "-snapshot", "user,id=net", "share=on,size=512M"}, []string{"cx16", "kvm"}},
		{"new kernel", "6.12.1", AccelTCG, VsockVhostUser, []string{"-cpu max,-cx16"}, nil},
		{"accelerated", "6.12.1", AccelKVM, VsockVhost, []string{"-accel kvm", "-cpu host", "vhost-vsock-pci,guest-cid=9"}, []string{"tcg", "vhost-user"}},
		{"no vsock", "6.1.0", AccelTCG, VsockNone, nil, []string{"vsock"}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			cfg.Kernel.Release = tc.release
			line := strings.Join(cfg.args(tc.accel, tc.vsock, "/d,x"), " ")
			for _, s := range tc.want {
				if !strings.Contains(line, s) {
					t.Errorf("no %q in %s", s, line)
				}
			}
			for _, s := range tc.not {
				if strings.Contains(line, s) {
					t.Errorf("%q in %s", s, line)
				}
			}
		})
	}
}

func TestConsole(t *testing.T) {
	var all bytes.Buffer
	c := console{copy: &all}
	for i := range 5000 {
		if _, err := c.Write([]byte(strings.Repeat("x", i%100) + "\r\n")); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := c.Write([]byte("last")); err != nil {
		t.Fatal(err)
	}
	s := c.String()
	if len(s) > consoleSize || len(s) < consoleSize/2 || !strings.HasSuffix(s, "x\nlast") || strings.Contains(s, "\r") {
		t.Errorf("kept %d bytes, the last are %q", len(s), s[len(s)-10:])
	}
	if cap(c.tail) > 8*consoleSize {
		t.Errorf("takes %d bytes", cap(c.tail))
	}
	if got := strings.ReplaceAll(all.String(), "\r", ""); !strings.HasSuffix(got, s) {
		t.Error("the copy differs")
	}
	if n, err := c.Write(bytes.Repeat([]byte("y"), 3*consoleSize)); n != 3*consoleSize || err != nil {
		t.Error(n, err)
	}
	broken, w := io.Pipe()
	_ = broken.CloseWithError(errors.New("full"))
	c.copy = w
	if n, err := c.Write([]byte("still")); n != 5 || err != nil || !strings.HasSuffix(c.String(), "still") {
		t.Errorf("a copy that fails: %d, %v", n, err)
	}
	if got := lastLines("a\nb\nc\n", 2); got != "b\nc" {
		t.Errorf("last lines %q", got)
	}
}

func TestStartErrors(t *testing.T) {
	good := Config{Kernel: Kernel{Image: "/nonexistent", Release: "6.1"}, Initrd: "/nonexistent", Accel: AccelTCG, Dir: t.TempDir()}
	for name, change := range map[string]func(*Config){
		"no QEMU":     func(c *Config) { c.QEMU = "/nonexistent/qemu" },
		"no kernel":   func(c *Config) { c.Kernel = Kernel{} },
		"no initrd":   func(c *Config) { c.Initrd = "" },
		"no memory":   func(c *Config) { c.MemoryMiB = -1 },
		"deep dir":    func(c *Config) { c.QEMU = "/bin/true"; c.Dir = filepath.Join(c.Dir, strings.Repeat("x", 120)) },
		"reserved ID": func(c *Config) { c.QEMU = "/bin/true"; c.CID = 2; c.Vsock = VsockVhostUser },
	} {
		t.Run(name, func(t *testing.T) {
			cfg := good
			change(&cfg)
			if name == "deep dir" {
				if err := os.Mkdir(cfg.Dir, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			v, err := Start(t.Context(), cfg)
			if err == nil {
				t.Error("started")
				if err := v.Close(); err != nil {
					t.Error(err)
				}
			}
			if left, err := filepath.Glob(filepath.Join(cfg.Dir, "vm-*")); err != nil || len(left) > 0 {
				t.Errorf("left behind: %q, %v", left, err)
			}
		})
	}
}

// A program that ends at once stands for a QEMU that refuses its arguments.
func TestEarlyEnd(t *testing.T) {
	dir := t.TempDir()
	qemu := filepath.Join(dir, "qemu")
	if err := os.WriteFile(qemu, []byte("#!/bin/sh\necho booting; echo 'no such machine' >&2; exit 3\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	v, err := Start(t.Context(), Config{QEMU: qemu, Kernel: Kernel{Image: "/k"}, Initrd: "/i", Accel: AccelTCG, Vsock: VsockNone, Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	<-v.Done()
	if err := v.Err(); err == nil || !strings.Contains(err.Error(), "exit status 3: no such machine") {
		t.Errorf("Err is %v", err)
	}
	if v.Console() != "booting\n" {
		t.Errorf("console is %q", v.Console())
	}
	if left, err := filepath.Glob(filepath.Join(dir, "vm-*")); err != nil || len(left) > 0 {
		t.Errorf("left behind: %q, %v", left, err)
	}
	if err := v.Close(); err == nil {
		t.Error("Close hides why it ended")
	}
}

// A QEMU that ignores SIGTERM is killed.
func TestStubbornEnd(t *testing.T) {
	dir := t.TempDir()
	qemu := filepath.Join(dir, "qemu")
	if err := os.WriteFile(qemu, []byte("#!/bin/sh\ntrap '' TERM; echo up; while :; do sleep 0.1; done\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	v, err := Start(t.Context(), Config{QEMU: qemu, Kernel: Kernel{Image: "/k"}, Initrd: "/i", Accel: AccelTCG, Dir: dir})
	if err != nil {
		t.Fatal(err)
	}
	for v.Console() == "" {
	}
	if err := v.Close(); err != nil {
		t.Error(err)
	}
	if err := v.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
}
