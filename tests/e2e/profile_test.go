package e2e

import (
	"crypto/sha256"
	"fmt"
	"strings"
	"testing"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// TestTheSecondStartIsKnown runs a command twice, each time in a new virtual machine: what
// the first has read, the second machine fetches before it is asked for. The command
// takes a little time between its files, as a program does.
func TestTheSecondStartIsKnown(t *testing.T) {
	need(t, places[0].needs...)
	r := newRig(t)
	const files = 24
	entries := busybox(t)
	var want strings.Builder
	script := "for f in"
	for i := range files {
		data, name := noise(uint64(100+i), 600_000), fmt.Sprintf("lib/%02d", i*7%files)
		entries = append(entries, registrytest.File(name, 0o644, data))
		if i%2 == 0 {
			fmt.Fprintf(&want, "%x  /%s\n", sha256.Sum256([]byte(data)), name)
			script += " /" + name
		}
	}
	entries = append(entries, registrytest.File("unused", 0o644, noise(99, 16<<20)))
	l := layer(t, formats[0].make, entries...)
	r.reg.PushImage("known", "v1", registrytest.Image{Layers: []registrytest.Layer{l}, Config: shell()})
	var starts []result
	for range 2 {
		res := r.must(job{vm: "qemu", image: r.ref("known:v1"), command: []string{"/bin/sh", "-c", script + "; do sha256sum $f; usleep 20000; done"}})
		if res.stdout != want.String() {
			t.Fatalf("stdout %q, want %q", res.stdout, want.String())
		}
		starts = append(starts, res)
	}
	first, second := starts[0].report.Guest, starts[1].report.Guest
	t.Logf("reads that waited: %d, then %d; %d bytes were fetched ahead", first.Misses, second.Misses, second.Replayed)
	if first.Replayed != 0 || second.Replayed < files/2*600_000 || second.Misses*2 > first.Misses {
		t.Errorf("the first start replayed %d bytes and waited %d times, the second %d bytes and %d times", first.Replayed, first.Misses, second.Replayed, second.Misses)
	}
}
