package virtiofsvm

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/vmtest"
)

// BenchmarkDevices reads one large file in one guest through this device and
// through QEMU's virtiofsd, in requests of 1 MiB and of 4 KiB, past the guest's
// cache. What the guest's programs take to start is part of it.
func BenchmarkDevices(b *testing.B) {
	const other = "/usr/lib/qemu/virtiofsd"
	if _, err := os.Stat(other); err != nil {
		b.Skipf("needs %s: install qemu-system-common of Debian 12", other)
	}
	base, err := os.MkdirTemp("", "fs-") //nolint:usetesting // sockets are below it: the path must be short
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { os.RemoveAll(base) })
	dir := filepath.Join(base, "images")
	const size = 64 << 20
	if err := os.Mkdir(dir, 0o755); err != nil {
		b.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "image"), bytes.Repeat([]byte("tatami"), size/6+1)[:size], 0o644); err != nil {
		b.Fatal(err)
	}
	ours, theirs := filepath.Join(base, "ours"), filepath.Join(base, "theirs")
	serve(b, nil, "--socket-path", ours, "--shared-dir", dir)
	startOther(b, other, theirs, dir)
	g := start(b, vmtest.Options{Args: slices.Concat(device("ours", ours, 1), device("theirs", theirs, 1))})
	g.sh("mkdir /ours /theirs && mount -t virtiofs ours /ours && mount -t virtiofs theirs /theirs")
	for _, tc := range []struct {
		name, dd string
		bytes    int64
	}{{"large", "bs=1M count=64", 64 << 20}, {"small", "bs=4k count=4096", 16 << 20}} {
		for _, fs := range []string{"ours", "theirs"} {
			b.Run(tc.name+"/"+fs, func(b *testing.B) {
				b.SetBytes(tc.bytes)
				for b.Loop() {
					if out := g.sh("dd if=/" + fs + "/image of=/dev/null iflag=direct " + tc.dd + " 2>&1"); !strings.Contains(out, "records out") {
						b.Fatal(out)
					}
				}
			})
		}
	}
}

func startOther(b *testing.B, bin, socket, dir string) {
	b.Helper()
	cmd := exec.Command(bin, "-f", "--socket-path="+socket, "-o", "source="+dir+",cache=always")
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		_ = cmd.Process.Kill() // it ends with the VMM
		_ = cmd.Wait()
	})
	for range 500 {
		if _, err := os.Stat(socket); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	b.Fatal("no socket of virtiofsd")
}
