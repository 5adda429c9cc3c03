package snapshotter

import (
	"crypto/rand"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/contrib/snapshotservice"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"
	"google.golang.org/grpc"
)

// Benchmark of layers: what containerd's benchsuite measures
// (core/snapshots/benchsuite, which is a test of its own package and knows only
// containerd's snapshotters): 16 layers of ten files of 1 MiB, of which some
// replace or remove those below. Beside ours runs containerd's overlayfs
// snapshotter, both through a socket and containerd's client.
const (
	benchLayers = 16
	benchFiles  = 10
	benchFile   = 1 << 20 // bytes
)

func BenchmarkLayers(b *testing.B) {
	needRoot(b)
	b.Run("tatami", func(b *testing.B) {
		g := newRig(b, Share)
		benchLayerStack(b, listen(b, func(s *grpc.Server) { g.Register(s) }))
	})
	b.Run("overlayfs", func(b *testing.B) {
		sn := must(overlay.NewSnapshotter(filepath.Join(b.TempDir(), "overlayfs")))(b)
		defer sn.Close()
		benchLayerStack(b, listen(b, func(s *grpc.Server) {
			snapshotsapi.RegisterSnapshotsServer(s, snapshotservice.FromSnapshotter(sn))
		}))
	})
}

func benchLayerStack(b *testing.B, sn snapshots.Snapshotter) {
	content := make([]byte, benchFile)
	_, _ = rand.Read(content)
	var prepare, write, commit time.Duration
	lap := func(sum *time.Duration, fn func() error) {
		start := time.Now()
		if err := fn(); err != nil {
			b.Fatal(err)
		}
		*sum += time.Since(start)
	}
	b.SetBytes(benchLayers * benchFiles * benchFile)
	for n := 0; b.Loop(); n++ {
		parent := ""
		for l := range benchLayers {
			key, name := fmt.Sprintf("key-%d-%d", n, l), fmt.Sprintf("layer-%d-%d", n, l)
			var mounts []mount.Mount
			lap(&prepare, func() (err error) { mounts, err = sn.Prepare(b.Context(), key, parent); return err })
			lap(&write, func() error {
				return mount.WithTempMount(b.Context(), mounts, func(root string) error { return writeLayer(root, l, content) })
			})
			lap(&commit, func() error { return sn.Commit(b.Context(), name, key) })
			parent = name
		}
	}
	for what, sum := range map[string]time.Duration{"prepare": prepare, "write": write, "commit": commit} {
		b.ReportMetric(float64(sum.Microseconds())/1000/float64(b.N*benchLayers), what+"-ms/layer")
	}
}

func writeLayer(root string, layer int, content []byte) error {
	for i := range benchFiles {
		path := filepath.Join(root, fmt.Sprint("f", i))
		if layer%3 == 1 && i%3 == 0 {
			if err := os.RemoveAll(path); err != nil {
				return err
			}
			continue
		}
		if err := os.WriteFile(path, content, 0o777); err != nil {
			return err
		}
	}
	return nil
}

// BenchmarkContainer is a container's snapshot made and removed, by mode.
func BenchmarkContainer(b *testing.B) {
	needRoot(b)
	for _, mode := range modes {
		b.Run(string(mode), func(b *testing.B) {
			g := newRig(b, mode, func(c *Config) { c.UpperSize = 1 << 30 })
			p := g.pull(b, "k8s.io", ref, g.images.publish(b, "", tree{"a": "1"}, tree{"b": "1"}))
			sn := listen(b, func(s *grpc.Server) { g.Register(s) })
			for b.Loop() {
				if _, err := sn.Prepare(b.Context(), "k8s.io/1/c", p.top()); err != nil {
					b.Fatal(err)
				}
				if err := sn.Remove(b.Context(), "k8s.io/1/c"); err != nil {
					b.Fatal(err)
				}
			}
		})
	}
}
