package virtiofsvm

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/tatami-containers/tatami/tests/virtiofsvm/posix"
	"github.com/tatami-containers/tatami/tests/vmtest"
)

// TestPosix runs the tests of package posix in a guest: on EROFS on an image file
// of the device, and, with all of go-fuse's posixtest, on an overlay above it, which
// is what a container has.
func TestPosix(t *testing.T) {
	f := newFixture(t)
	tree := t.TempDir()
	if err := posix.Prepare(tree); err != nil {
		t.Fatal(err)
	}
	run(t, "", "mkfs.erofs", "--quiet", filepath.Join(f.dir, "posix"), tree)
	serve(t, nil, "--socket-path", f.socket, "--shared-dir", f.dir)
	g := start(t, vmtest.Options{Args: device("images", f.socket, 1), Files: posixPrograms(t)})
	g.sh("chmod 755 /opt/* && mkdir /lower /upper /over && " + mountFS)
	g.sh("mount -t erofs -o ro $(" + losetup + " --find --show --read-only --direct-io=on /fs/posix) /lower")
	g.sh("mount -t tmpfs tmpfs /upper && mkdir /upper/u /upper/w /upper/tmp")
	g.sh("mount -t overlay -o lowerdir=/lower,upperdir=/upper/u,workdir=/upper/w overlay /over && mkdir /over/new")
	g.during(t, "read only", func(_ *testing.T, g *guest) { g.posix("/opt/posix -readonly /lower") })
	g.during(t, "overlay", func(_ *testing.T, g *guest) {
		g.posix("/opt/posixtest -posixdir /over/new -test.skip '^TestAll$/^(" + notOnOverlay + ")$'")
	})
}

// notOnOverlay are the tests of posixtest that overlayfs with a tmpfs above does not
// pass: before Linux 6.6 that has neither attributes of users nor O_DIRECT, and
// overlayfs no O_TMPFILE.
const notOnOverlay = "XAttr|XAttrLarge|DirectIO|Tmpfile"

// posixPrograms are the tests of package posix, and go-fuse's.
func posixPrograms(t testing.TB) map[string][]byte {
	t.Helper()
	dir := t.TempDir()
	for name, pkg := range map[string]string{"posix": "./posix", "posixtest": "github.com/hanwen/go-fuse/v2/posixtest"} {
		cmd := exec.Command("go", "test", "-c", "-o", filepath.Join(dir, name), pkg)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("go test -c: %v: %s", err, out)
		}
	}
	return programs(t, dir, "posix", "posixtest")
}

// posix runs such a program. A test that is skipped has not been thought of.
func (g *guest) posix(command string) {
	g.t.Helper()
	out := g.try("cd /tmp && TMPDIR=/tmp " + command + " -test.v -test.timeout 5m 2>&1")
	if !strings.HasSuffix(out, "PASS\n") || strings.Contains(out, "--- SKIP") || !strings.Contains(out, "--- PASS") {
		g.t.Errorf("%s:\n%s", command, out)
	}
}
