package virtiofsvm

import (
	"bytes"
	"os"
	"os/exec"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/vmtest"
)

// other is a virtio-fs device of another project, with the arguments that Kata
// gives to its own (src/runtime-rs/Makefile, DEFVIRTIOFS*).
type other struct {
	name    string
	places  []string // of its program: paths, or names in PATH
	missing string   // what to do when it is nowhere
	args    func(socket, dir string) []string
}

var others = []other{
	{"rust", []string{os.Getenv("TATAMI_VIRTIOFSD"), "virtiofsd", "../../.cache/virtiofsd/bin/virtiofsd", "/usr/libexec/virtiofsd"},
		"needs the virtiofsd in Rust: `make virtiofsd` builds it, or set TATAMI_VIRTIOFSD", func(socket, dir string) []string {
			return []string{"--socket-path=" + socket, "--shared-dir=" + dir, "--cache=auto", "--thread-pool-size=1", "--log-level=error"}
		}},
	{"c", []string{"/usr/lib/qemu/virtiofsd"}, "needs the virtiofsd in C: install qemu-system-common of Debian 12", func(socket, dir string) []string {
		return []string{"-f", "--socket-path=" + socket, "-o", "source=" + dir + ",cache=auto", "--thread-pool-size=1"}
	}},
}

// find returns the program's path, "" when there is none.
func (o *other) find() string {
	for _, p := range o.places {
		if path, err := exec.LookPath(p); err == nil {
			return path
		}
	}
	return ""
}

// serve starts the device and waits until a VMM may connect.
func (o *other) serve(t testing.TB, socket, dir string) {
	t.Helper()
	cmd := exec.Command(o.find(), o.args(socket, dir)...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Process.Kill() // it ends with the VMM
		_ = cmd.Wait()
		if t.Failed() {
			t.Logf("virtiofsd (%s): %s", o.name, &out)
		}
	})
	for range 500 {
		if _, err := os.Stat(socket); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("virtiofsd (%s) makes no socket: %s", o.name, &out)
}

// TestOthers asks this device and the others the same questions about the same
// files, in one guest.
func TestOthers(t *testing.T) {
	f := newFixture(t)
	serve(t, nil, "--socket-path", f.socket, "--shared-dir", f.dir)
	args := device("ours", f.socket, 1)
	for _, o := range others {
		if o.find() != "" {
			o.serve(t, f.socket+o.name, f.dir)
			args = append(args, device(o.name, f.socket+o.name, 1)...)
		}
	}
	g := start(t, vmtest.Options{Args: args})
	ask := func(tag string) (answers []string) {
		g.sh("mkdir /" + tag + " && mount -t virtiofs -o ro " + tag + " /" + tag)
		for _, q := range questions {
			answers = append(answers, g.try("cd /"+tag+"; { "+q+"; } 2>&1"))
		}
		return answers
	}
	ours := ask("ours")
	for _, o := range others {
		t.Run(o.name, func(t *testing.T) {
			if o.find() == "" {
				t.Skip(o.missing)
			}
			for i, theirs := range ask(o.name) {
				if ours[i] != theirs {
					t.Errorf("%s\n ours: %s\nother: %s", questions[i], ours[i], theirs)
				}
			}
		})
	}
	g.powerOff()
}

// questions are what must not depend on the device. Times and modes do: those of
// images are all the same.
var questions = []string{
	"ls -A",
	"stat -c '%n %F %s %h %u:%g %B' image",
	"sha256sum image",
	"tail -c 100 image | sha256sum",
	"dd if=image bs=1000 skip=3 count=5 2>/dev/null | sha256sum",
	"dd if=image bs=4096 iflag=direct skip=2 count=9 2>/dev/null | sha256sum",
	"dd if=image bs=1M skip=1000 2>&1 | grep records",
	"cat missing; cat image/x; ls image/; cat .",
	"[ -r image ] && [ ! -x image ] && [ -f image ] && echo so",
}
