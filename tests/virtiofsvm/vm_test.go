// Package virtiofsvm boots guests whose images come from tatami-virtiofsd.
package virtiofsvm

import (
	"bufio"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math/rand"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/tests/vmtest"
	"github.com/tatami-containers/tatami/tools/vm"
)

const (
	testInit = "github.com/tatami-containers/tatami/tests/vmtest/testinit"
	testPort = 3000 // where testinit listens
	program  = "github.com/tatami-containers/tatami/virtiofs/cmd/tatami-virtiofsd"
)

// describe lists a tree: types, owners, modes, targets, sizes, contents.
const describe = `F=$(mktemp) && find . | sort | xargs stat -c '%N %f %u:%g' && find . -type f | sort > $F && ` +
	`xargs stat -c %s < $F && xargs sha256sum < $F && rm $F`

var built struct {
	once sync.Once
	path string
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if built.path != "" {
		os.RemoveAll(filepath.Dir(built.path))
	}
	os.Exit(code)
}

// daemonPath builds the program as it is shipped.
func daemonPath(t testing.TB) string {
	t.Helper()
	built.once.Do(func() {
		var dir string
		if dir, built.err = os.MkdirTemp("", "virtiofsd-"); built.err != nil { //nolint:usetesting // for all tests
			return
		}
		built.path = filepath.Join(dir, "tatami-virtiofsd")
		cmd := exec.Command("go", "build", "-o", built.path, program)
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			built.err = fmt.Errorf("build %s: %w: %s", program, err, out)
		}
	})
	if built.err != nil {
		t.Fatal(built.err)
	}
	return built.path
}

// stderr keeps what a program writes and tells of one line.
type stderr struct {
	mu    sync.Mutex
	text  bytes.Buffer
	ready chan struct{}
}

const waiting = "Waiting for vhost-user socket connection"

func (s *stderr) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	before := strings.Contains(s.text.String(), waiting)
	s.text.Write(p)
	if !before && strings.Contains(s.text.String(), waiting) {
		close(s.ready)
	}
	return len(p), nil
}

func (s *stderr) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}

// daemon is a tatami-virtiofsd.
type daemon struct {
	cmd  *exec.Cmd
	err  stderr
	done chan struct{} // it has ended
}

// serve starts the program and waits until a VMM may connect. A descriptor of l,
// if there is one, is the program's 3.
func serve(t testing.TB, l *os.File, args ...string) *daemon {
	t.Helper()
	d := launch(t, l, args...)
	select {
	case <-d.err.ready:
	case <-d.done:
		t.Fatalf("tatami-virtiofsd ended: %s", &d.err)
	}
	return d
}

// launch starts the program.
func launch(t testing.TB, l *os.File, args ...string) *daemon {
	t.Helper()
	d := &daemon{cmd: exec.Command(daemonPath(t), args...), done: make(chan struct{})}
	d.err.ready = make(chan struct{})
	d.cmd.Stderr = &d.err
	if l != nil {
		d.cmd.ExtraFiles = []*os.File{l}
	}
	if err := d.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(d.done)
		_ = d.cmd.Wait() // its state is looked at
	}()
	t.Cleanup(func() {
		_ = d.cmd.Process.Kill() // it may have ended
		<-d.done
		if t.Failed() {
			t.Logf("tatami-virtiofsd: %s", &d.err)
		}
	})
	return d
}

// ended waits for the program's end, which shall be a good one.
func (d *daemon) ended(t *testing.T) {
	t.Helper()
	select {
	case <-d.done:
	case <-time.After(time.Minute):
		t.Fatal("tatami-virtiofsd outlives its VMM")
	}
	if c := d.cmd.ProcessState.ExitCode(); c != 0 {
		t.Errorf("tatami-virtiofsd: exit code %d", c)
	}
}

// guest is a machine with testinit and the device.
type guest struct {
	*vm.VM
	t testing.TB
}

func boot(t testing.TB, socket string, queues int, reboot bool) *guest {
	t.Helper()
	return start(t, vmtest.Options{Reboot: reboot, CPUs: min(queues, 2), Args: append(device("images", socket, queues),
		"-m", "slots=2,maxmem=2G", "-monitor", "unix:"+socket+".monitor,server=on,wait=off")})
}

// device is a virtio-fs device for QEMU.
func device(tag, socket string, queues int) []string {
	return []string{"-chardev", "socket,id=" + tag + ",path=" + socket, "-device",
		fmt.Sprintf("vhost-user-fs-pci,chardev=%s,tag=%s,queue-size=1024,num-request-queues=%d", tag, tag, queues)}
}

func start(t testing.TB, o vmtest.Options) *guest {
	t.Helper()
	o.Init, o.Binaries = testInit, append(o.Binaries, losetup)
	g := &guest{vmtest.Start(t, o), t}
	g.wait()
	return g
}

func (g *guest) wait() {
	g.t.Helper()
	vmtest.WaitReady(g.t, g.VM, func(ctx context.Context) error {
		c, err := vsock.Dial(ctx, g.GuestAddress(testPort))
		if err != nil {
			return err
		}
		return c.Close()
	})
}

// during runs a subtest with the guest as its own.
func (g *guest) during(t *testing.T, name string, test func(*testing.T, *guest)) {
	t.Run(name, func(t *testing.T) { test(t, &guest{g.VM, t}) })
}

// start runs a command of testinit.
func (g *guest) start(command string) io.ReadCloser {
	g.t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c, err := vsock.Dial(ctx, g.GuestAddress(testPort))
	if err != nil {
		g.t.Fatal(err)
	}
	if _, err := io.WriteString(c, command+"\n"); err != nil {
		g.t.Fatal(err)
	}
	return c
}

// try runs a shell script, whose output it returns.
func (g *guest) try(script string) string {
	g.t.Helper()
	c := g.start("sh " + script)
	defer c.Close()
	b, err := io.ReadAll(c)
	if err != nil {
		g.t.Fatalf("%s: %v", script, err)
	}
	return string(b)
}

// sh runs a script that has to succeed.
func (g *guest) sh(script string) string {
	g.t.Helper()
	out := g.try("{ " + script + "; } && echo good")
	s, ok := strings.CutSuffix(out, "good\n")
	if !ok {
		g.t.Fatalf("%s: %s", script, out)
	}
	return s
}

func (g *guest) powerOff() {
	g.t.Helper()
	c := g.start("poweroff")
	defer c.Close()
	select {
	case <-g.Done():
	case <-time.After(time.Minute):
		g.t.Fatal("the machine does not power off")
	}
	if err := g.Err(); err != nil {
		g.t.Error(err)
	}
}

// fixture is a directory with an image in it.
type fixture struct {
	dir    string
	socket string
	want   string // the tree's description
	blob   [sha256.Size]byte
}

const (
	mountFS = "mkdir -p /fs /mnt && mount -t virtiofs images /fs"
	// Direct: the loop device asks for all of a request at once, and keeps no pages.
	mountImage  = "mount -t erofs -o ro $(" + losetup + " --find --show --read-only --direct-io=on /fs/image) /mnt"
	mountCached = "mount -t erofs -o ro,loop /fs/image /mnt"
	losetup     = "/usr/sbin/losetup"
	blobSize    = 4 << 20
)

func newFixture(t testing.TB) *fixture {
	t.Helper()
	vmtest.Need(t)
	for _, p := range []string{"mkfs.erofs", "busybox", losetup} {
		if _, err := exec.LookPath(p); err != nil {
			t.Skipf("needs %s: install erofs-utils, busybox-static and mount", p)
		}
	}
	base, err := os.MkdirTemp("", "fs-") //nolint:usetesting // a socket is below it: the path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(base); err != nil {
			t.Error(err)
		}
	})
	f := &fixture{dir: filepath.Join(base, "images"), socket: filepath.Join(base, "vmm")}
	tree := filepath.Join(base, "tree")
	f.blob = makeTree(t, tree)
	if err := os.Mkdir(f.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, "", "mkfs.erofs", "--quiet", filepath.Join(f.dir, "image"), tree)
	f.want = run(t, tree, "busybox", "sh", "-c", describe)
	return f
}

func run(t testing.TB, dir, name string, args ...string) string {
	t.Helper()
	cmd := exec.Command(name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v: %s", name, err, out)
	}
	return string(out)
}

// makeTree makes small files, links, a hole and one large file, whose digest it
// returns.
func makeTree(t testing.TB, tree string) [sha256.Size]byte {
	t.Helper()
	rnd := rand.New(rand.NewSource(1))
	write := func(name string, n int) []byte {
		b := make([]byte, n)
		rnd.Read(b)
		path := filepath.Join(tree, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o755), os.WriteFile(path, b, 0o644)); err != nil {
			t.Fatal(err)
		}
		return b
	}
	for i := range 60 {
		write(fmt.Sprintf("d%d/f%d", i%7, i), i*i*10)
	}
	blob := write("blob", blobSize)
	if err := errors.Join(
		os.Symlink("d1/f1", filepath.Join(tree, "link")), os.Link(filepath.Join(tree, "d1/f1"), filepath.Join(tree, "d2/hard")),
		os.Mkdir(filepath.Join(tree, "empty"), 0o700), os.Truncate(filepath.Join(tree, "d3/f3"), 1<<20),
		os.Chmod(filepath.Join(tree, "d4/f4"), 0o4755), syscall.Mkfifo(filepath.Join(tree, "pipe"), 0o600)); err != nil {
		t.Fatal(err)
	}
	return sha256.Sum256(blob)
}

func (g *guest) expectTree(f *fixture) {
	g.t.Helper()
	if got := g.sh("cd /mnt && " + describe); got != f.want {
		g.t.Errorf("the guest sees another tree:\n%s\nwant:\n%s", got, f.want)
	}
}

func (g *guest) expectBlob(f *fixture) {
	g.t.Helper()
	if got := g.sh("sha256sum < /mnt/blob"); !strings.HasPrefix(got, fmt.Sprintf("%x", f.blob)) {
		g.t.Errorf("the large file is %s", got)
	}
}

// TestOneQueue is a sandbox of Kata's Go runtime: a socket that listens already,
// one queue. Its guest mounts again, boots again and powers off.
func TestOneQueue(t *testing.T) {
	f := newFixture(t)
	l := listen(t, f.socket)
	if err := os.Symlink("image", filepath.Join(f.dir, "symlink")); err != nil {
		t.Fatal(err)
	}
	d := serve(t, l, "--syslog", "--cache=auto", "--shared-dir="+f.dir, "--fd=3", "--thread-pool-size=1", "-o", "announce_submounts")
	g := boot(t, f.socket, 1, true)
	monitor := dialMonitor(t, f.socket+".monitor")
	g.sh(mountFS + " && " + mountImage)
	g.expectTree(f)
	g.during(t, "listing", func(t *testing.T, g *guest) {
		if got := g.sh("ls /fs"); got != "image\n" {
			t.Errorf("%q", got)
		}
	})
	g.during(t, "read only", func(t *testing.T, g *guest) {
		for _, s := range []string{"echo x > /fs/new", "echo x >> /fs/image", "mkdir /fs/d", "rm -f /fs/image", "mv /fs/image /fs/x", "chmod 777 /fs/image"} {
			if got := g.try(s + " 2>&1 || true"); !strings.Contains(got, "Read-only file system") {
				t.Errorf("%s: %q", s, got)
			}
		}
	})
	g.during(t, "files come and go", func(t *testing.T, g *guest) { testFilesComeAndGo(t, f, g) })
	g.during(t, "changes under load", func(t *testing.T, g *guest) { testChangesUnderLoad(t, f, g, monitor) })
	g.during(t, "remount", func(t *testing.T, g *guest) {
		g.sh("umount /mnt && " + losetup + " -D && umount /fs && " + mountFS + " && " + mountImage)
		g.expectBlob(f)
	})
	g.during(t, "reboot", func(t *testing.T, g *guest) {
		g.sh("touch /tmp/before; " + load)
		c := g.start("reboot")
		defer c.Close()
		vmtest.WaitReady(t, g.VM, g.rebooted)
		g.sh(mountFS + " && " + mountImage)
		g.expectBlob(f)
	})
	g.powerOff()
	d.ended(t)
}

func listen(t *testing.T, path string) *os.File {
	t.Helper()
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM|syscall.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	l := os.NewFile(uintptr(fd), path)
	t.Cleanup(func() { l.Close() })
	if err := errors.Join(syscall.Bind(fd, &syscall.SockaddrUnix{Name: path}), syscall.Listen(fd, 1)); err != nil {
		t.Fatal(err)
	}
	return l
}

func testFilesComeAndGo(t *testing.T, f *fixture, g *guest) {
	late := filepath.Join(f.dir, "late")
	if got := g.try("cat /fs/late 2>&1 || true"); !strings.Contains(got, "No such file") {
		t.Errorf("before: %q", got)
	}
	if err := errors.Join(os.WriteFile(filepath.Join(f.dir, ".new"), []byte("hello"), 0o644), os.Rename(filepath.Join(f.dir, ".new"), late)); err != nil {
		t.Fatal(err)
	}
	if got := g.sh("cat /fs/late"); got != "hello" {
		t.Errorf("after it came: %q", got)
	}
	if err := os.Remove(late); err != nil {
		t.Fatal(err)
	}
	// The daemon hears of it a moment later.
	g.sh("i=0; while cat /fs/late >/dev/null 2>&1; do i=$((i+1)); [ $i -lt 200 ] || exit 1; sleep 0.05; done")
}

// rebooted succeeds in a guest that has no trace of the boot before.
func (g *guest) rebooted(ctx context.Context) error {
	return g.says(ctx, "ls /tmp; echo listed", "listed\n")
}

// answers succeeds in a guest that can be reached.
func (g *guest) answers(ctx context.Context) error { return g.says(ctx, "echo here", "here\n") }

// says tries a command once.
func (g *guest) says(ctx context.Context, script, want string) error {
	c, err := vsock.Dial(ctx, g.GuestAddress(testPort))
	if err != nil {
		return err
	}
	defer c.Close()
	if deadline, ok := ctx.Deadline(); ok {
		if err := c.SetDeadline(deadline); err != nil {
			return err
		}
	}
	if _, err := io.WriteString(c, "sh "+script+"\n"); err != nil {
		return err
	}
	b, err := io.ReadAll(c)
	if err == nil && string(b) != want {
		err = fmt.Errorf("%s: %q, want %q", script, b, want)
	}
	return err
}

// testChangesUnderLoad changes the guest's memory and pauses the machine while it
// reads.
func testChangesUnderLoad(t *testing.T, f *fixture, g *guest, m *monitor) {
	const rounds = 8
	// In the background: our vsock device drops connections when it is paused.
	g.sh(fmt.Sprintf("(for i in $(seq %d); do echo 3 > /proc/sys/vm/drop_caches; sha256sum < /mnt/blob; done > /tmp/sums 2>&1 &)", rounds))
	for i := range 2 {
		m.do(t, fmt.Sprintf("object_add memory-backend-memfd,id=mem%d,size=128M,share=on", i))
		m.do(t, fmt.Sprintf("device_add pc-dimm,id=dimm%d,memdev=mem%d", i, i))
		m.do(t, "stop")
		m.do(t, "cont")
		vmtest.WaitReady(t, g.VM, g.answers) // our vsock device starts anew
		g.sh("cat /fs/image > /dev/null")
	}
	g.sh(fmt.Sprintf("i=0; while [ $(wc -l < /tmp/sums) -lt %d ]; do i=$((i+1)); [ $i -lt 600 ] || exit 1; sleep 0.1; done", rounds))
	if got, want := g.sh("cat /tmp/sums"), strings.Repeat(fmt.Sprintf("%x  -\n", f.blob), rounds); got != want {
		t.Errorf("digests of the large file:\n%swant:\n%s", got, want)
	}
	if got := m.do(t, "info memory-devices"); strings.Count(got, "hotplugged: true") != 2 {
		t.Errorf("memory: %q", got)
	}
}

// monitor is QEMU's, for people (HMP).
type monitor struct {
	c net.Conn
	r *bufio.Reader
}

const prompt = "(qemu) "

func dialMonitor(t *testing.T, path string) *monitor {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	m := &monitor{c, bufio.NewReader(c)}
	m.answer(t)
	return m
}

func (m *monitor) answer(t *testing.T) string {
	t.Helper()
	if err := m.c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	var b []byte
	for !strings.HasSuffix(string(b), prompt) {
		c, err := m.r.ReadByte()
		if err != nil {
			t.Fatalf("QEMU's monitor: %q, %v", b, err)
		}
		b = append(b, c)
	}
	return strings.TrimSuffix(string(b), prompt)
}

// do runs a command, whose answer it returns with the echo of the command.
func (m *monitor) do(t *testing.T, command string) string {
	t.Helper()
	if _, err := io.WriteString(m.c, command+"\n"); err != nil {
		t.Fatal(err)
	}
	out := m.answer(t)
	if strings.Contains(out, "Error") {
		t.Fatalf("%s: %s", command, out)
	}
	return out
}

// load keeps the device busy.
const load = "for i in 1 2 3; do (while :; do dd if=/fs/image of=/dev/null bs=64k iflag=direct; done >/dev/null 2>&1 &) ; done"

// loaded boots a sandbox of runtime-rs with more queues, and a load on them.
func loaded(t *testing.T, queues int, cache, mount string) (*daemon, *guest) {
	t.Helper()
	f := newFixture(t)
	d := serve(t, nil, "--socket-path", f.socket, "--shared-dir", f.dir, "--cache", cache, "--xattr")
	g := boot(t, f.socket, queues, false)
	g.sh(mountFS + " && " + mount)
	g.expectTree(f)
	g.sh(load)
	return d, g
}

// A VMM that is killed takes the daemon with it.
func TestMachineKilled(t *testing.T) {
	d, g := loaded(t, 4, "never", mountImage)
	if err := g.Kill(); err != nil {
		t.Error(err)
	}
	d.ended(t)
}

// A child of the daemon that is killed is a pause for the guest: what it reads is
// right, however often, and its memory and its boots are served as before.
func TestChildKilled(t *testing.T) {
	f := newFixture(t)
	d := serve(t, nil, "--socket-path", f.socket, "--shared-dir", f.dir, "--cache", "never")
	g := boot(t, f.socket, 4, true)
	monitor := dialMonitor(t, f.socket+".monitor")
	g.sh(mountFS + " && " + mountImage)
	const readers, kills = 3, 20
	sum := fmt.Sprintf("%x  -\n", f.blob)
	g.sh(fmt.Sprintf("for r in $(seq %d); do (while [ ! -e /tmp/stop ]; do echo 3 > /proc/sys/vm/drop_caches; "+
		"sha256sum < /mnt/blob; done > /tmp/sums$r 2>&1; touch /tmp/done$r) > /dev/null 2>&1 & done", readers))
	for range kills {
		d.killChild(t)
		time.Sleep(4500 * time.Millisecond) // more often, and the daemon gives up
	}
	g.sh(fmt.Sprintf("touch /tmp/stop; i=0; while [ $(ls /tmp/done* 2>/dev/null | wc -l) -lt %d ]; do i=$((i+1)); [ $i -lt 600 ] || exit 1; sleep 0.1; done", readers))
	for r := range readers {
		got := g.sh(fmt.Sprintf("cat /tmp/sums%d", r+1))
		if n := strings.Count(got, "\n"); n < 3 || got != strings.Repeat(sum, n) {
			t.Errorf("reader %d: digests of the large file:\n%swant: %s", r, got, sum)
		}
	}
	g.expectTree(f)
	g.during(t, "files come and go", func(t *testing.T, g *guest) { testFilesComeAndGo(t, f, g) })
	g.during(t, "changes under load", func(t *testing.T, g *guest) { testChangesUnderLoad(t, f, g, monitor) })
	g.during(t, "reboot", func(t *testing.T, g *guest) {
		g.sh("touch /tmp/before")
		c := g.start("reboot")
		defer c.Close()
		vmtest.WaitReady(t, g.VM, g.rebooted)
		d.killChild(t)
		g.sh(mountFS + " && " + mountImage)
		g.expectBlob(f)
	})
	g.powerOff()
	d.ended(t)
}

// killChild kills the process that has the guest.
func (d *daemon) killChild(t *testing.T) {
	t.Helper()
	threads, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", d.cmd.Process.Pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range threads {
		b, err := os.ReadFile(path)
		if pid, _ := strconv.Atoi(strings.TrimSpace(string(b))); err == nil && pid > 0 {
			if err := syscall.Kill(pid, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
			return
		}
	}
	t.Fatal("the daemon has no child")
}

// A guest whose device is gone cannot be saved, but it ends when its owner, who
// sees the end of the process, ends it.
func TestDaemonKilled(t *testing.T) {
	d, g := loaded(t, 2, "always", mountCached)
	if err := d.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-d.done
	c := g.start("sh dd if=/fs/image of=/dev/null bs=64k iflag=direct") // hangs in the guest's kernel
	defer c.Close()
	if err := g.Close(); err != nil { // bounded
		t.Error(err)
	}
}
