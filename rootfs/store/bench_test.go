package store_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// BenchmarkHit compares reads of present bytes with reads of the file that has
// them.
func BenchmarkHit(b *testing.B) {
	img := storetest.NewImage("bench", storetest.Solid(1, 256*miB))
	cfg := store.Config{Dir: b.TempDir(), Keep: true}
	i := openImage(b, open(b, cfg), img, storetest.NewSource("good", img))
	check(b, i.Fill(context.Background()))
	f, err := os.Open(filepath.Join(cfg.Dir, "segments", img.Index.Segments[0].ID.Encoded()+".data"))
	check(b, err)
	defer f.Close() // only read
	for _, n := range []int64{4 * kiB, 128 * kiB} {
		reads := map[string]func(p []byte, off int64) (int, error){
			"pread": f.ReadAt,
			"store": func(p []byte, off int64) (int, error) { return i.ReadAt(context.Background(), p, off+firstChunk) },
		}
		for name, read := range reads {
			b.Run(fmt.Sprintf("%s/%dKiB", name, n/kiB), func(b *testing.B) {
				b.SetBytes(n)
				p := make([]byte, n)
				for k := int64(0); b.Loop(); k++ {
					if _, err := read(p, k*7919*4096%(256*miB-n)&^4095); err != nil {
						b.Fatal(err)
					}
				}
			})
		}
	}
}

// memorySource serves one segment as fast as memory is.
type memorySource struct{ plain []byte }

func (memorySource) Name() string { return "memory" }

func (m memorySource) Fetch(_ context.Context, _ *index.Segment, off, n int64) (io.ReadCloser, error) {
	return io.NopCloser(bytes.NewReader(m.plain[off : off+n])), nil
}

// BenchmarkMiss reads absent bytes from a source that costs nothing.
func BenchmarkMiss(b *testing.B) {
	seg := storetest.Solid(1, 128*miB)
	img := storetest.NewImage("bench", seg)
	for _, keep := range []bool{true, false} {
		for _, order := range []string{"sequential", "random"} {
			b.Run(fmt.Sprintf("keep=%v/%s", keep, order), func(b *testing.B) {
				b.SetBytes(128 * miB)
				p := make([]byte, 128*kiB)
				for b.Loop() {
					s := open(b, store.Config{Dir: b.TempDir(), Keep: keep})
					i := openImage(b, s, img, memorySource{seg.Plain})
					for k := range int64(1024) {
						if order == "random" {
							k = k * 389 % 1024
						}
						if _, err := i.ReadAt(context.Background(), p, firstChunk+k*128*kiB); err != nil {
							b.Fatal(err)
						}
					}
					check(b, i.Close())
					check(b, s.Close())
				}
			})
		}
	}
}

// BenchmarkSequentialLink reports which part of a line of 5 ms and 1 Gbit/s a
// cold sequential read uses.
func BenchmarkSequentialLink(b *testing.B) {
	img := storetest.NewImage("bench", storetest.Solid(1, 256*miB))
	for _, keep := range []bool{true, false} {
		b.Run(fmt.Sprintf("keep=%v", keep), func(b *testing.B) {
			for b.Loop() {
				share := linkShare(b, store.Config{Dir: b.TempDir(), Keep: keep}, img)
				b.ReportMetric(100*share, "%link")
			}
		})
	}
}

// BenchmarkResidentMemory reports the growth of the process while a store that
// keeps nothing is read at full rate.
func BenchmarkResidentMemory(b *testing.B) {
	seg := storetest.Solid(1, 128*miB)
	img := storetest.NewImage("bench", seg)
	i := openImage(b, open(b, store.Config{Dir: b.TempDir()}), img, memorySource{seg.Plain})
	p := make([]byte, 128*kiB)
	debug.FreeOSMemory()
	before, most := resident(b), int64(0)
	for b.Loop() {
		for k := range int64(1024) {
			if _, err := i.ReadAt(context.Background(), p, firstChunk+k*128*kiB); err != nil {
				b.Fatal(err)
			}
			if k%64 == 0 {
				most = max(most, resident(b))
			}
		}
	}
	b.ReportMetric(float64(most-before)/float64(miB), "MiB-grown")
}

// resident is the anonymous memory of this process in bytes.
func resident(b *testing.B) int64 {
	data, err := os.ReadFile("/proc/self/status")
	check(b, err)
	for _, line := range strings.Split(string(data), "\n") {
		if f := strings.Fields(line); len(f) > 1 && f[0] == "RssAnon:" {
			n, err := strconv.ParseInt(f[1], 10, 64)
			check(b, err)
			return n * kiB
		}
	}
	b.Fatal("no RssAnon in /proc/self/status")
	return 0
}
