package profiles

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
)

// A node that has never seen an image, but has a list of what its starts read, or finds
// it beside the image in the registry, lets a container wait for hardly anything.
func TestColdNodes(t *testing.T) {
	if why := missing(); why != "" {
		t.Skip(why)
	}
	t.Setenv("TMPDIR", t.TempDir()) // the sandboxes' own directories
	ref := pushImage(t, startRegistry(t))
	first := startNode(t, "")
	first.prepare(t, ref)
	alone := first.start(t, ref)
	await(t, "the start is recorded", func() bool { return strings.Contains(first.tatami(t, "ls"), ref) })
	if list := first.tatami(t, "ls"); !strings.Contains(list, "/bin/sh") || !strings.Contains(list, "recorded") || strings.Contains(list, "wc -c") {
		t.Errorf("listed:\n%s", list)
	}
	paths := first.tatami(t, "export", ref)
	for _, name := range []string{"/bin/busybox", "/app/000", "/app/073"} {
		if !strings.Contains(paths, name+"\n") {
			t.Errorf("%s is not exported:\n%s", name, paths)
		}
	}
	list := filepath.Join(t.TempDir(), "list")
	if err := os.WriteFile(list, []byte(paths), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Run("list", func(t *testing.T) {
		n := startNode(t, "")
		n.prepare(t, ref)
		if said := n.tatami(t, "import", ref, list); !strings.Contains(said, "; 0 paths are no files") {
			t.Errorf("said %q", said)
		}
		await(t, "replays end", func() bool { return n.stats(t).Replays == 0 })
		fewer(t, n.start(t, ref), alone)
	})
	t.Run("published", func(t *testing.T) {
		if said := strings.TrimSpace(first.tatami(t, "push", ref)); digest.Digest(said).Validate() != nil {
			t.Errorf("published %q", said)
		}
		n := startNode(t, "")
		n.prepare(t, ref)
		if listed := n.tatami(t, "ls"); !strings.Contains(listed, "registry") || n.stats(t).ReplayedBytes < reads*size {
			t.Errorf("%d bytes were replayed; listed:\n%s", n.stats(t).ReplayedBytes, listed)
		}
		fewer(t, n.start(t, ref), alone)
	})
	first.tatami(t, "rm", ref)
	if listed := first.tatami(t, "ls"); strings.Contains(listed, ref) {
		t.Errorf("after rm:\n%s", listed)
	}
}

// fewer wants at least 90 % fewer reads that wait.
func fewer(t *testing.T, misses, alone int64) {
	t.Helper()
	t.Logf("%d reads had to wait, %d of the first start", misses, alone)
	if alone < 10 || 10*misses > alone {
		t.Errorf("%d reads had to wait; want at most a tenth of %d", misses, alone)
	}
}
