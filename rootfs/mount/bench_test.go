package mount

import (
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/mount/session"
)

// BenchmarkCold reads an image with all caches dropped before each round:
//
//	go test -run '^$' -bench Cold -benchtime 5x ./rootfs/mount
//
// "native" is EROFS on the same file without a session in between. Compare
// within one run only; others on the machine share its disk and caches.
func BenchmarkCold(b *testing.B) {
	img := makeImage(b, 4, 2000, 256<<20)
	tops := []struct {
		name  string
		mount func(b *testing.B) string
	}{
		{"native", func(b *testing.B) string { return nativeMount(b, img) }},
		{"file-direct", func(b *testing.B) string { return superviseOne(b, img, session.Direct, FilePath) }},
		{"file-journal", func(b *testing.B) string { return superviseOne(b, img, session.Journal, FilePath) }},
		{"loop-direct", func(b *testing.B) string { return superviseOne(b, img, session.Direct, LoopPath) }},
		{"loop-journal", func(b *testing.B) string { return superviseOne(b, img, session.Journal, LoopPath) }},
	}
	for _, top := range tops {
		b.Run(top.name, func(b *testing.B) {
			root := top.mount(b)
			b.Run("sequential", func(b *testing.B) {
				b.SetBytes(256 << 20)
				cold(b, func() { readOut(b, root+"/large") })
			})
			b.Run("small", func(b *testing.B) {
				cold(b, func() { readSmall(b, root, 2000, 1) })
			})
			b.Run("small-by-8", func(b *testing.B) {
				cold(b, func() { readSmall(b, root, 2000, 8) })
			})
		})
	}
}

func cold(b *testing.B, f func()) {
	for b.Loop() {
		b.StopTimer()
		dropCaches(b)
		b.StartTimer()
		f()
	}
}

func readOut(b *testing.B, path string) {
	f, err := os.Open(path)
	check(b, err)
	_, err = io.CopyBuffer(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{f}, make([]byte, 128<<10))
	check(b, err)
	check(b, f.Close())
}

func readSmall(b *testing.B, root string, n, parallel int) {
	var wg sync.WaitGroup
	for k := range parallel {
		wg.Go(func() {
			for i := k; i < n; i += parallel {
				if _, err := os.ReadFile(fmt.Sprintf("%s/d%d/f%d", root, i%20, i)); err != nil {
					b.Error(err)
				}
			}
		})
	}
	wg.Wait()
}

func nativeMount(b *testing.B, img *testImage) string {
	dir := b.TempDir()
	fd, err := newErofs(img.path, true)
	if err != nil {
		b.Skipf("needs file-backed EROFS: %v", err)
	}
	check(b, place(fd, dir))
	b.Cleanup(func() { check(b, unix.Unmount(dir, 0)) })
	return dir
}

func superviseOne(b *testing.B, img *testImage, mode session.Mode, p Path) string {
	rec := supervise(b, mode, workerConfig{Prefer: p}).mount(img, "a")
	if rec.Path != p {
		b.Skipf("needs a kernel that mounts by %s", p)
	}
	return filepath.Dir(rec.Target) + "/state/lower/" + img.manifest.Encoded()
}

// TestMemory logs what a worker takes, and bounds it under as many readers as
// the kernel lets in.
func TestMemory(t *testing.T) {
	img := makeImage(t, 4, 2000, 64<<20)
	bothModes(t, func(t *testing.T, mode session.Mode) {
		s := supervise(t, mode, workerConfig{Prefer: LoopPath, Delay: time.Millisecond})
		rec := s.mount(img, "a")
		a, err := s.order(order{Op: "stats"})
		check(t, err)
		idle := rss(t, a.Pid)
		var r readers
		r.start(img, rec.Target, 64)
		peak := idle
		for range 20 {
			r.progress(t, 100)
			peak = max(peak, rss(t, a.Pid))
		}
		r.finish(t)
		t.Logf("worker: %d KiB idle, %d KiB under load", idle, peak)
		if peak > 64<<10 {
			t.Errorf("worker takes %d KiB under load", peak)
		}
	})
}

// rss is the resident memory of a process in KiB.
func rss(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	check(t, err)
	anon, file := 0, 0
	for line := range strings.Lines(string(b)) {
		_, _ = fmt.Sscanf(line, "RssAnon: %d kB", &anon)
		_, _ = fmt.Sscanf(line, "RssFile: %d kB", &file)
	}
	return anon + file
}
