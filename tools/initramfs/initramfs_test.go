package initramfs

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"encoding/binary"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
	"golang.org/x/sys/unix"
)

// fakeModule is the smallest ELF file with a .modinfo section.
func fakeModule(t *testing.T, info ...string) []byte {
	t.Helper()
	modinfo := []byte(strings.Join(info, "\x00") + "\x00")
	names := []byte("\x00.modinfo\x00.shstrtab\x00")
	h := elf.Header64{Type: uint16(elf.ET_REL), Machine: uint16(elf.EM_X86_64), Version: 1, Ehsize: 64, Shentsize: 64, Shnum: 3, Shstrndx: 2,
		Shoff: 64}
	copy(h.Ident[:], "\x7fELF\x02\x01\x01")
	data := uint64(64 + 3*64)
	sections := []elf.Section64{{},
		{Name: 1, Type: uint32(elf.SHT_PROGBITS), Off: data, Size: uint64(len(modinfo))},
		{Name: 10, Type: uint32(elf.SHT_STRTAB), Off: data + uint64(len(modinfo)), Size: uint64(len(names))}}
	var b bytes.Buffer
	for _, v := range []any{h, sections, modinfo, names} {
		if err := binary.Write(&b, binary.LittleEndian, v); err != nil {
			t.Fatal(err)
		}
	}
	return b.Bytes()
}

func compress(t *testing.T, ext string, b []byte) []byte {
	t.Helper()
	var out bytes.Buffer
	var w io.WriteCloser
	var err error
	switch ext {
	case ".xz":
		w, err = xz.NewWriter(&out)
	case ".zst":
		w, err = zstd.NewWriter(&out)
	case ".gz":
		w = gzip.NewWriter(&out)
	default:
		return b
	}
	if err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write(b); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func put(t *testing.T, path string, b []byte) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
}

// moduleTree has modules in all compressions, a cycle, a soft dependency.
func moduleTree(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	for name, info := range map[string][]string{
		"fs/erofs.ko":               {"license=GPL", "depends=lib-crc,netfs"},
		"lib/lib_crc.ko.xz":         {"depends=", "softdep=pre: crc-fast crc-none post: late"},
		"lib/crc-fast.ko.zst":       {"depends="},
		"lib/late.ko":               {"depends="},
		"net/vsock.ko.gz":           {"depends=cycle"},
		"net/cycle.ko":              {"depends=vsock"},
		"fs/broken.ko":              {"depends=absent"},
		"kernel/notes.ko.unrelated": {"depends="},
	} {
		put(t, filepath.Join(dir, "kernel", name), compress(t, filepath.Ext(name), fakeModule(t, info...)))
	}
	put(t, filepath.Join(dir, "modules.builtin"), []byte("kernel/fs/netfs/netfs.ko\nkernel/fs/fuse.ko\n"))
	return dir
}

func TestResolveModules(t *testing.T) {
	dir := moduleTree(t)
	for _, tc := range []struct {
		name           string
		want, optional []string
		order          string
	}{
		{"dependencies first", []string{"erofs"}, nil, "crc_fast lib_crc erofs"},
		{"each once", []string{"lib_crc", "erofs", "erofs"}, nil, "crc_fast lib_crc erofs"},
		{"either name", []string{"crc-fast", "crc_fast"}, nil, "crc_fast"},
		{"built in", []string{"fuse"}, nil, ""},
		{"cycle", []string{"vsock"}, nil, "cycle vsock"},
		{"optional", nil, []string{"nothing", "late"}, "late"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			mods, err := resolveModules(dir, tc.want, tc.optional)
			if err != nil {
				t.Fatal(err)
			}
			var names []string
			for _, m := range mods {
				names = append(names, m.name)
				if !bytes.HasPrefix(m.data, []byte("\x7fELF")) {
					t.Errorf("%s is not decompressed", m.name)
				}
			}
			if got := strings.Join(names, " "); got != tc.order {
				t.Errorf("order is %q, want %q", got, tc.order)
			}
		})
	}
	for _, name := range []string{"nothing", "broken"} {
		if _, err := resolveModules(dir, []string{name}, nil); !errdefs.IsNotFound(err) {
			t.Errorf("%s: %v, want ErrNotFound", name, err)
		}
	}
}

func FuzzModinfo(f *testing.F) {
	f.Add([]byte("\x7fELF\x02\x01\x01"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		_, _ = parseModinfo(b) // must not panic
	})
}

func build(t *testing.T, cfg Config) []byte {
	t.Helper()
	var b bytes.Buffer
	if err := Build(&b, cfg); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// unpack has cpio(1) read the archive.
func unpack(t *testing.T, archive []byte) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "cpio", "-idm", "--no-absolute-filenames", "--quiet")
	if _, err := exec.LookPath("cpio"); err != nil {
		if _, err := exec.LookPath("busybox"); err != nil {
			t.Skip("needs cpio or busybox to read the archive")
		}
		cmd = exec.CommandContext(t.Context(), "busybox", "cpio", "-idm")
	}
	cmd.Dir = t.TempDir()
	cmd.Stdin = bytes.NewReader(archive)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("cpio: %v: %s", err, out)
	}
	return cmd.Dir
}

func TestBuild(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cfg := Config{Init: exe, ModuleDir: moduleTree(t), Modules: []string{"erofs"},
		Files: map[string][]byte{"/etc/x": []byte("content"), "etc/empty": nil, "/a/b/c/d": []byte("1")}}
	archive := build(t, cfg)
	if !bytes.Equal(archive, build(t, cfg)) {
		t.Error("two builds differ")
	}
	dir := unpack(t, archive)
	for name, want := range map[string]string{
		"etc/x": "content", "etc/empty": "", "a/b/c/d": "1",
		"lib/modules/tatami.order": "crc_fast.ko\nlib_crc.ko\nerofs.ko\n",
	} {
		if b, err := os.ReadFile(filepath.Join(dir, name)); err != nil || string(b) != want {
			t.Errorf("%s is %q, %v", name, b, err)
		}
	}
	for _, name := range []string{"dev", "proc", "sys"} {
		if st, err := os.Stat(filepath.Join(dir, name)); err != nil || !st.IsDir() {
			t.Errorf("%s: %v", name, err)
		}
	}
	st, err := os.Stat(filepath.Join(dir, "init"))
	if err != nil || st.Mode().Perm() != 0o755 {
		t.Fatalf("init: %v, %v", st, err)
	}
	if same, err := os.Stat(exe); err != nil || st.Size() != same.Size() {
		t.Errorf("init has %d bytes", st.Size())
	}
}

// A dynamic program must run from nothing but the archive.
func TestDynamicBinary(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: chroot")
	}
	bin, err := filepath.EvalSymlinks("/usr/bin/env")
	if err != nil {
		t.Skip("needs /usr/bin/env")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	dir := unpack(t, build(t, Config{Init: exe, Binaries: []string{bin}}))
	cmd := exec.CommandContext(t.Context(), "chroot", dir, bin, "-i", "A=B", bin)
	if out, err := cmd.CombinedOutput(); err != nil || string(out) != "A=B\n" {
		t.Errorf("in the archive: %v: %q", err, out)
	}
}

func TestContainerRuntimes(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: chroot")
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, bin := range []string{"/usr/bin/crun", "/usr/sbin/runc"} {
		t.Run(filepath.Base(bin), func(t *testing.T) {
			if _, err := os.Stat(bin); err != nil {
				t.Skip("needs " + bin)
			}
			dir := unpack(t, build(t, Config{Init: exe, Binaries: []string{bin}}))
			proc := filepath.Join(dir, "proc") // crun runs itself again from there
			if err := unix.Mount("proc", proc, "proc", 0, ""); err != nil {
				t.Fatal(err)
			}
			defer func() {
				if err := unix.Unmount(proc, 0); err != nil {
					t.Error(err)
				}
			}()
			if out, err := exec.CommandContext(t.Context(), "chroot", dir, bin, "--version").CombinedOutput(); err != nil {
				t.Errorf("in the archive: %v: %s", err, out)
			}
		})
	}
}

func TestBusybox(t *testing.T) {
	busybox, err := exec.LookPath("busybox")
	if err != nil {
		t.Skip("needs busybox")
	}
	dir := unpack(t, build(t, Config{Init: busybox, Busybox: busybox, Files: map[string][]byte{"/bin/ls": []byte("mine")}}))
	if target, err := os.Readlink(filepath.Join(dir, "bin/sh")); target != "busybox" || err != nil {
		t.Errorf("sh leads to %q, %v", target, err)
	}
	if b, err := os.ReadFile(filepath.Join(dir, "bin/ls")); string(b) != "mine" || err != nil {
		t.Errorf("an applet replaced a file: %v", err)
	}
}

func TestBuildErrors(t *testing.T) {
	script := filepath.Join(t.TempDir(), "script")
	put(t, script, []byte("#!/bin/sh\n"))
	for name, cfg := range map[string]Config{
		"no init":       {Init: "/nonexistent"},
		"no binary":     {Init: script, Binaries: []string{"/nonexistent"}},
		"no ELF":        {Init: script, Binaries: []string{script}},
		"no modules":    {Init: script, ModuleDir: "/nonexistent", Modules: []string{"x"}},
		"init is a dir": {Init: "/"},
	} {
		if err := Build(io.Discard, cfg); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
}

func TestConfiguredDirs(t *testing.T) {
	dir := t.TempDir()
	conf := filepath.Join(dir, "ld.so.conf")
	put(t, conf, []byte("# comment\n/opt/lib # behind\ninclude conf.d/*.conf\nrelative\n"))
	put(t, filepath.Join(dir, "conf.d/a.conf"), []byte("/a/lib/\n"))
	put(t, filepath.Join(dir, "conf.d/other"), []byte("/not\n"))
	got, err := configuredDirs(conf)
	if err != nil || !slices.Equal(got, []string{"/opt/lib", "/a/lib"}) {
		t.Errorf("got %q, %v", got, err)
	}
	if got, err := configuredDirs(filepath.Join(dir, "none")); got != nil || err != nil {
		t.Errorf("without a file: %q, %v", got, err)
	}
}
