package virtiofsvm

import (
	"fmt"
	"io"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

// A daemon that gets no processor for some seconds, as on a node that swaps or is
// short of it, is a pause for its guest and nothing else.
func TestDaemonStopped(t *testing.T) {
	const rounds, stop = 6, 3 * time.Second
	f := newFixture(t)
	d := serve(t, nil, "--socket-path", f.socket, "--shared-dir", f.dir)
	g := boot(t, f.socket, 2, false)
	g.sh(mountFS + " && " + mountImage)
	g.sh("for i in 1 2 3; do (while :; do dd if=/fs/image of=/dev/null bs=64k iflag=direct 2>/tmp/dd$i || cat /tmp/dd$i >> /tmp/failed; done >/dev/null 2>&1 &) ; done")
	g.sh(fmt.Sprintf("(for i in $(seq %d); do echo 3 > /proc/sys/vm/drop_caches; sha256sum < /mnt/blob; done > /tmp/sums 2>&1 &)", rounds))
	d.signal(t, syscall.SIGSTOP)
	c := g.start("sh dd if=/fs/image of=/dev/null bs=64k iflag=direct 2>/dev/null && echo read")
	defer c.Close()
	if err := c.(interface{ SetReadDeadline(time.Time) error }).SetReadDeadline(time.Now().Add(stop)); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); !os.IsTimeout(err) {
		t.Errorf("a stopped device answers: %q, %v", b, err)
	}
	d.signal(t, syscall.SIGCONT)
	if err := c.(interface{ SetReadDeadline(time.Time) error }).SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); string(b) != "read\n" {
		t.Errorf("the read that had to wait: %q, %v", b, err)
	}
	g.sh(fmt.Sprintf("i=0; while [ $(wc -l < /tmp/sums) -lt %d ]; do i=$((i+1)); [ $i -lt 600 ] || exit 1; sleep 0.1; done", rounds))
	if got, want := g.sh("cat /tmp/sums"), strings.Repeat(fmt.Sprintf("%x  -\n", f.blob), rounds); got != want {
		t.Errorf("digests of the large file:\n%swant:\n%s", got, want)
	}
	if got := g.try("cat /tmp/failed 2>/dev/null"); strings.TrimSpace(strings.TrimSuffix(got, "sh: exit status 1\n")) != "" {
		t.Errorf("reads that failed:\n%s", got)
	}
	g.powerOff()
	d.ended(t)
}
