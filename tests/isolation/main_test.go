package isolation

import (
	"fmt"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/testbin"
)

// bin is the directory of the programs under test.
var bin string

// patience bounds every wait for a program.
const patience = time.Minute

func TestMain(m *testing.M) {
	if kind := os.Getenv(childKind); kind != "" {
		os.Exit(childMain(kind))
	}
	os.Exit(testbin.Main(m, &bin, []string{"./host/cmd/tatami-host", "./guest/cmd/tatami-guest"}))
}

// need skips where the machine lacks something and says what.
func need(tb testing.TB) {
	tb.Helper()
	if os.Geteuid() != 0 {
		tb.Skip("needs root: mounts file systems")
	}
	if _, err := os.Stat("/dev/fuse"); err != nil {
		tb.Skipf("needs FUSE: %v", err)
	}
	for _, p := range []string{"chrt", "ip", "tc"} {
		if _, err := exec.LookPath(p); err != nil {
			tb.Skipf("needs %s: `make setup` installs it", p)
		}
	}
}

func check(tb testing.TB, err error) {
	tb.Helper()
	if err != nil {
		tb.Fatal(err)
	}
}

// run runs a program to its end.
func run(tb testing.TB, name string, args ...string) {
	tb.Helper()
	if out, err := exec.Command(name, args...).CombinedOutput(); err != nil {
		tb.Fatalf("%s %v: %v\n%s", name, args, err, out)
	}
}

func megabytes(n int64) string { return fmt.Sprintf("%.1f MB", float64(n)/1e6) }
