package formats

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/treecmp"
)

// node is the directory of a tatami-host.
type node string

func newNode(t *testing.T) node {
	t.Helper()
	dir, err := os.MkdirTemp("", "fmt-") //nolint:usetesting // sockets are in it: the path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			log, _ := os.ReadFile(filepath.Join(dir, "tatami-host.log")) // it may not have come so far
			t.Logf("log of the node: %s", log[max(0, len(log)-4000):])
		}
		_ = os.RemoveAll(dir) // what holds it is the end of a host, which is idle
	})
	return node(dir)
}

// mounted mounts an image on this machine, host and guest being processes, and
// returns what it shows.
func (n node) mounted(t *testing.T, ref string, flags ...string) (treecmp.Tree, error) {
	t.Helper()
	target := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	args := append([]string{"mount", "--root", string(n)}, flags...)
	cmd := exec.CommandContext(ctx, filepath.Join(bin, "tatami"), append(args, ref, target)...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 30 * time.Second
	cmd.Env = append(os.Environ(), "TMPDIR="+string(n))
	out := &output{mounted: make(chan struct{})}
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	select {
	case err := <-ended:
		return nil, fmt.Errorf("mount %s: %w: %s", ref, err, out)
	case <-out.mounted:
	}
	tree, err := treecmp.Snapshot(target)
	_ = cmd.Process.Signal(os.Interrupt) // it unmounts
	if err2 := <-ended; err == nil && err2 != nil {
		err = fmt.Errorf("unmount %s: %w: %s", ref, err2, out)
	}
	return tree, err
}

// output is what a mount says; mounted is closed when it says that it is there.
type output struct {
	mounted chan struct{}

	mu   sync.Mutex
	b    bytes.Buffer
	seen bool
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.b.Write(p)
	if !o.seen && strings.Contains(o.b.String(), "is mounted at") {
		o.seen = true
		close(o.mounted)
	}
	return len(p), nil
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.b.String()
}
