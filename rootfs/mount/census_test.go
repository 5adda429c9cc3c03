package mount

import (
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

// counts is what a mount could leak. Loop devices are those of ours: other
// programs attach some too.
type counts struct{ fds, mounts, loops, threads, goroutines int }

func census(t *testing.T) counts {
	t.Helper()
	fds, err := os.ReadDir("/proc/self/fd")
	check(t, err)
	threads, err := os.ReadDir("/proc/self/task")
	check(t, err)
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	check(t, err)
	c := counts{fds: len(fds), threads: len(threads), mounts: strings.Count(string(mounts), "\n"), goroutines: runtime.NumGoroutine()}
	backing, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	check(t, err)
	for _, f := range backing {
		if b, err := os.ReadFile(f); err == nil && strings.Contains(string(b), ".erofs") && strings.Contains(string(b), "/session/") {
			c.loops++
		}
	}
	return c
}

// fits allows the runtime some threads of its own.
func (c counts) fits(before counts) bool {
	return c.fds <= before.fds && c.loops <= before.loops && c.mounts <= before.mounts &&
		c.goroutines <= before.goroutines+1 && c.threads <= before.threads+8
}
