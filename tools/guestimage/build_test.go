package guestimage

import (
	"debug/elf"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/tools/vm"
)

// TestReproducible builds each kind twice, from and to different directories,
// and compares with what other machines make: a digest changes only with what
// goes in, or with the libraries that write TOML and zstd.
func TestReproducible(t *testing.T) {
	for _, c := range []struct {
		name, digest string
		o            Options
	}{
		{"extension", "35d02d97bdf12625c8bade1f5d6eef2a3e70cda7132fb1c7c8d15d6f87f9d61b", Options{Kind: Extension, Arch: "amd64"}},
		{"extension arm64", "0a63fe6be9cd038880f35f021c54b9418aee4c971443899df10313ab8ee8be3d", Options{Kind: Extension, Arch: "arm64", Config: "version = 1\n", CDH: "hub"}},
		{"measured extension", "8f7584cc92573f4c69c58e95662bedb75f5e8543dd096809bd4cdda1f0ee80af", Options{Kind: Extension, Arch: "amd64", Verity: true}},
		{"tarball", "58f4abcc922700f473bdce06fa09ab9017ff4736080a4da8da34963a1111306e", Options{Kind: Tarball, Arch: "amd64", Config: "version = 1\n"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			one, two := make1(t, sources(t, c.o)), make1(t, sources(t, c.o))
			if read(t, one.File) != read(t, two.File) || one.VerityParams != two.VerityParams {
				t.Error("two builds differ")
			}
			if one.Digest.Encoded() != c.digest {
				t.Errorf("digest %s, want %s", one.Digest, c.digest)
			}
		})
	}
}

func TestInitramfs(t *testing.T) {
	k, err := vm.FindKernel("")
	if err != nil {
		t.Fatal(err)
	}
	o := sources(t, Options{Kind: Initramfs, Arch: runtime.GOARCH, Config: "version = 1\n"})
	o.Modules, o.Runtime = k.Modules, "/usr/bin/crun"
	one, two := make1(t, o), make1(t, o)
	if one.Digest != two.Digest {
		t.Error("two builds differ")
	}
	list := tool(t, "sh", "-c", "busybox cpio -t <"+one.File)
	for _, name := range []string{"init", "etc/tatami/guest.toml", "usr/bin/crun", "lib/modules/fuse.ko"} {
		if !strings.Contains("\n"+list, "\n"+name+"\n") {
			t.Errorf("%s is missing in\n%s", name, list)
		}
	}
}

func TestRefused(t *testing.T) {
	dir := t.TempDir()
	put := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	arm, script := put("arm", fake(elf.EM_AARCH64, "")), put("script", "#!/bin/sh\n")
	object := []byte(fake(elf.EM_X86_64, ""))
	object[16] = byte(elf.ET_REL)
	other := runtime.GOARCH
	if other == "amd64" {
		other = "arm64"
	}
	for _, c := range []struct {
		name, want string
		change     func(o *Options)
	}{
		{"kind", "want extension", func(o *Options) { o.Kind = "iso" }},
		{"architecture", "want amd64", func(o *Options) { o.Arch = "s390x" }},
		{"other machine", "EM_AARCH64", func(o *Options) { o.Guest = arm }},
		{"dynamic", "build it static", func(o *Options) { o.Guest = "/usr/bin/env" }},
		{"dynamic pause", "build it static", func(o *Options) { o.Pause = "/usr/bin/env" }},
		{"script", "no ELF program", func(o *Options) { o.Guest = script }},
		{"object file", "no program", func(o *Options) { o.Guest = put("object", string(object)) }},
		{"directory", "no regular file", func(o *Options) { o.Guest = dir }},
		{"missing", "nothing", func(o *Options) { o.Guest = filepath.Join(dir, "nothing") }},
		{"hub of another machine", "EM_AARCH64", func(o *Options) { o.CDH = arm }},
		{"missing config", "nothing", func(o *Options) { o.Config = filepath.Join(dir, "nothing") }},
		{"salt alone", "hash tree only", func(o *Options) { o.Salt = []byte{1} }},
		{"long salt", "256 at most", func(o *Options) { o.Verity, o.Salt = true, make([]byte, 257) }},
		{"measured tarball", "kind extension only", func(o *Options) { o.Kind, o.Verity = Tarball, true }},
		{"hub in a tarball", "kind extension only", func(o *Options) { o.Kind, o.CDH = Tarball, o.Guest }},
		{"initramfs of another machine", "of this machine", func(o *Options) { o.Kind, o.Arch = Initramfs, other }},
	} {
		t.Run(c.name, func(t *testing.T) {
			o := sources(t, Options{Kind: Extension, Arch: "amd64"})
			c.change(&o)
			out := t.TempDir()
			file := filepath.Join(out, "image")
			_, err := Build(file, o)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), file) {
				t.Errorf("error %v, want %q in it", err, c.want)
			}
			if missing := strings.HasPrefix(c.name, "missing"); !missing && !errdefs.IsInvalidArgument(err) || missing && !errdefs.IsNotFound(err) {
				t.Errorf("class of %v", err)
			}
			if left, err := os.ReadDir(out); err != nil || len(left) > 0 {
				t.Errorf("left behind: %v, %v", left, err)
			}
		})
	}
}
