package guestimage

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tatami-containers/tatami/tests/torture"
)

// fake is the smallest file that counts as a static program, with some content:
// it is the same on every machine.
func fake(m elf.Machine, content string) string {
	h := elf.Header64{
		Type: uint16(elf.ET_EXEC), Machine: uint16(m), Version: uint32(elf.EV_CURRENT),
		Ehsize: 64, Phentsize: 56, Shentsize: 64,
	}
	copy(h.Ident[:], elf.ELFMAG)
	h.Ident[elf.EI_CLASS], h.Ident[elf.EI_DATA], h.Ident[elf.EI_VERSION] = byte(elf.ELFCLASS64), byte(elf.ELFDATA2LSB), byte(elf.EV_CURRENT)
	var b bytes.Buffer
	_ = binary.Write(&b, binary.LittleEndian, h) // into memory
	return b.String() + content
}

// sources writes the programs that an image is made of into a new directory.
func sources(t *testing.T, o Options) Options {
	t.Helper()
	dir := t.TempDir()
	m := machines[o.Arch]
	put := func(name, content string) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	o.Guest = put("guest", fake(m, strings.Repeat("tatami-guest ", 100_000)))
	o.Pause = put("pause", fake(m, "pause"))
	if o.Config != "" {
		o.Config = put("config", o.Config)
	}
	if o.CDH != "" {
		o.CDH = put("cdh", fake(m, o.CDH))
	}
	return o
}

// make1 builds an image in a directory of its own.
func make1(t *testing.T, o Options) *Result {
	t.Helper()
	r, err := Build(filepath.Join(t.TempDir(), "image"), o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// tool runs a program of others, which must succeed.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), name, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %q: %v\n%s", name, args, err, out)
	}
	return string(out)
}

// mounted checks an EROFS file and lets the kernel mount it.
func mounted(t *testing.T, file string) string {
	t.Helper()
	torture.Root(t)
	tool(t, "fsck.erofs", file)
	return torture.MountImage(t, file, t.TempDir(), true)
}

func read(t *testing.T, path string) string {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
