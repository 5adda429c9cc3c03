package containerd

import (
	"fmt"
	"os"
	"testing"
	"time"
)

// BenchmarkStart measures, with an image of TATAMI_BENCH_IMAGE (a reference at a
// registry of this machine; else a small one of its own), how long a pull takes
// and how long it is from there to the output of a first command in a container,
// under CRI and runc: with containerd's overlayfs and with ours in mode share, on
// a node that has nothing. Compare within one run.
func BenchmarkStart(b *testing.B) {
	for _, name := range []string{"overlayfs", "tatami"} {
		b.Run(name, func(b *testing.B) {
			var pull, start time.Duration
			for range b.N {
				b.StopTimer()
				n, pod, image := benchNode(b, name)
				b.StartTimer()
				begin := time.Now()
				n.pullFor(b, image, "")
				pulled := time.Now()
				id := n.create(b, pod, container{name: "app", image: image, command: []string{"/bin/sleep", "1000000"}, user: "root"})
				if got := n.exec(b, id, "/bin/echo", "started"); got != "started" {
					b.Fatalf("the container says %q", got)
				}
				pull, start = pull+pulled.Sub(begin), start+time.Since(pulled)
				b.StopTimer()
				n.removePod(b, pod)
				b.StartTimer()
			}
			b.ReportMetric(pull.Seconds()/float64(b.N), "pull-s/op")
			b.ReportMetric(start.Seconds()/float64(b.N), "start-s/op")
		})
	}
}

// benchNode is a fresh node with containerd 2.4, one snapshotter and a sandbox.
func benchNode(b *testing.B, snapshotter string) (n *node, pod, image string) {
	b.Helper()
	n, reg := newNode(b, releases[0]), startRegistry(b)
	s := setup{Pause: reg.pushPause(b), Snapshotter: snapshotter}
	if snapshotter == "tatami" {
		n.host(b, share)
		s.Proxies = []proxy{n.proxyOf("tatami")}
	}
	n.containerd(b, s)
	image = os.Getenv("TATAMI_BENCH_IMAGE")
	if image == "" {
		image = reg.pushApp(b, fmt.Sprintf("bench%d", b.N), 1).ref
	}
	return n, n.pod(b, "bench", ""), image
}
