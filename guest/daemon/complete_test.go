package daemon

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// TestCompleteImageLeavesTheDaemon fills an image and sees that the kernel then
// reads it from a local file: without a read of the daemon, which is killed and
// asked nothing.
func TestCompleteImageLeavesTheDaemon(t *testing.T) {
	n := newNode(t)
	n.add("c1", sampleRef, n.pushSample("sample"), "host")
	g := startGuest(t, n, "--store-dir", t.TempDir())
	root := g.mustPull("c1", sampleRef)
	loop := loopOf(t, g.path("state"))
	if backing := backingFile(t, loop); !strings.Contains(backing, g.path("state")) {
		t.Fatalf("the loop device starts on %s", backing)
	}
	if _, err := g.Prefetch(t.Context(), &api.PrefetchRequest{Id: "c1"}); err != nil {
		t.Fatal(err)
	}
	for deadline := time.Now().Add(time.Minute); strings.Contains(backingFile(t, loop), g.path("state")); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("still on %s", backingFile(t, loop))
		}
	}
	before := g.stats()
	dropCaches(t)
	for i := range sampleFiles {
		got, err := os.ReadFile(filepath.Join(root, samplePath(i)))
		if err != nil || string(got) != sampleContent(i) {
			t.Fatalf("%s: %d bytes, %v", samplePath(i), len(got), err)
		}
	}
	if after := g.stats(); after.Hits != before.Hits || after.Misses != before.Misses {
		t.Errorf("the daemon answered %d reads", after.Hits+after.Misses-before.Hits-before.Misses)
	}
	list, err := g.List(t.Context(), &api.ListRequest{})
	if err != nil || len(list.Mounts) != 1 || !list.Mounts[0].Complete {
		t.Errorf("list %v, %v", list, err)
	}
	if _, err := g.Unmount(t.Context(), &api.UnmountRequest{Id: "c1"}); err != nil {
		t.Error(err)
	}
}

// loopOf is the name of the loop device that is mounted below dir.
func loopOf(t *testing.T, dir string) string {
	t.Helper()
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(b)) {
		_, source, _ := strings.Cut(line, " - erofs ")
		if strings.Contains(line, dir) && strings.HasPrefix(source, "/dev/loop") {
			return filepath.Base(strings.Fields(source)[0])
		}
	}
	t.Fatalf("no loop device below %s in:\n%s", dir, b)
	return ""
}

func backingFile(t *testing.T, loop string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("/sys/block", loop, "loop/backing_file"))
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}
