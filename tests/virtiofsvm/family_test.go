package virtiofsvm

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// family lists the program's processes: itself, then what it has started.
func (d *daemon) family(t testing.TB) []int {
	t.Helper()
	pids := []int{d.cmd.Process.Pid}
	for i := 0; i < len(pids); i++ {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pids[i]))
		if err != nil || len(files) == 0 {
			t.Fatalf("children of process %d: %v %v", pids[i], files, err)
		}
		for _, f := range files {
			b, err := os.ReadFile(f)
			if err != nil {
				continue // a thread that has ended
			}
			for _, word := range strings.Fields(string(b)) {
				pids = append(pids, number(t, word))
			}
		}
	}
	return pids
}

// signal sends a signal to all of the program.
func (d *daemon) signal(t testing.TB, s syscall.Signal) {
	t.Helper()
	for _, pid := range d.family(t) {
		if err := syscall.Kill(pid, s); err != nil {
			t.Fatal(err)
		}
	}
}

// counter sums a line "NAME: number" of a file in /proc/PID over the program's
// processes.
func (d *daemon) counter(t testing.TB, file, name string) (sum int64) {
	t.Helper()
	for _, pid := range d.family(t) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", pid, file))
		if err != nil {
			t.Fatal(err)
		}
		_, rest, ok := strings.Cut("\n"+string(b), "\n"+name+":")
		if !ok {
			t.Fatalf("no %s in /proc/%d/%s", name, pid, file)
		}
		sum += int64(number(t, strings.Fields(rest)[0]))
	}
	return sum
}

func number(t testing.TB, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
