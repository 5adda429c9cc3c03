// Package faults reads images through tatami-host and tatami-guest while their
// registry fails in every way that tests/registrytest knows, and behind nginx in
// some that it does not: no read may fail that a retry can save, an error that is
// left says what is wrong with what, and nothing needs a new mount afterwards.
package faults

import (
	"flag"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/testbin"
)

// bin is the directory of the programs under test.
var bin string

// patience bounds every wait; nothing here is to take so long.
const patience = 3 * time.Minute

// parallel is how many tests run at a time: they wait far more than they compute.
const parallel = "24"

func TestMain(m *testing.M) {
	flag.Parse()
	if err := flag.Set("test.parallel", parallel); err != nil {
		panic(err) // package testing has this flag
	}
	os.Exit(testbin.Main(m, &bin, []string{"./host/cmd/tatami-host", "./guest/cmd/tatami-guest"}))
}

// need skips a test where it cannot run and says what is missing.
func need(t *testing.T, programs ...string) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("needs root: mounts file systems")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		t.Skipf("needs FUSE: %v", err)
	}
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s: `make setup` installs it", p)
		}
	}
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// eventually waits until a condition holds.
func eventually(t *testing.T, what string, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(patience); !ok(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("waited in vain: %s", what)
		}
	}
}
