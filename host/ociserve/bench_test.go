package ociserve

import (
	"io"
	"os/exec"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// BenchmarkSend compares sending from a file with copying. The client is curl, so that
// cpu-s/GB is this process' alone.
func BenchmarkSend(b *testing.B) {
	for _, network := range []string{"tcp", "unix"} {
		for _, way := range []string{"copy", "file"} {
			b.Run(network+"/"+way, func(b *testing.B) {
				s := open(b, 64<<20)
				if mapped := s.body; way == "copy" {
					s.body = func(off, n int64) io.ReadCloser { return copied{mapped(off, n)} }
				}
				_, addr := s.serve(b, network)
				curl(b, network, addr) // warm
				b.SetBytes(s.desc.Size)
				before := cpu(b)
				for b.Loop() {
					curl(b, network, addr)
				}
				b.ReportMetric((cpu(b)-before).Seconds()/float64(b.N)/float64(s.desc.Size)*1e9, "cpu-s/GB")
			})
		}
	}
}

// curl gets the blob and drops it.
func curl(b *testing.B, network, addr string) {
	b.Helper()
	args := []string{"-sSf", "-o", "/dev/null", "http://" + addr + "/v2/a/blobs/b"}
	if network == "unix" {
		args = []string{"-sSf", "-o", "/dev/null", "--unix-socket", addr, "http://x/v2/a/blobs/b"}
	}
	if out, err := exec.CommandContext(b.Context(), "curl", args...).CombinedOutput(); err != nil {
		b.Fatalf("curl: %v\n%s", err, out)
	}
}

// cpu is what this process has used.
func cpu(b *testing.B) time.Duration {
	b.Helper()
	var u unix.Rusage
	if err := unix.Getrusage(unix.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
