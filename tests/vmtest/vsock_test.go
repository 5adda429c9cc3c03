package vmtest_test

import (
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
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/tests/vmtest"
	"github.com/tatami-containers/tatami/tools/vm"
)

const (
	testInit = "github.com/tatami-containers/tatami/tests/vmtest/testinit"
	testPort = 3000 // where testinit listens
)

// guest is a guest with testinit.
type guest struct {
	t    *testing.T
	addr string
	host func(port uint32) string
}

func boot(t *testing.T, o vmtest.Options) (*vm.VM, *guest) {
	t.Helper()
	o.Init = testInit
	m := vmtest.Start(t, o)
	g := &guest{t: t, addr: m.GuestAddress(testPort), host: m.HostAddress}
	g.wait(m)
	return m, g
}

func (g *guest) wait(m *vm.VM) {
	g.t.Helper()
	vmtest.WaitReady(g.t, m, func(ctx context.Context) error {
		c, err := vsock.Dial(ctx, g.addr)
		if err != nil {
			return err
		}
		return c.Close()
	})
}

type stream interface {
	net.Conn
	CloseWrite() error
}

// run starts a command in the guest.
func (g *guest) run(command string) stream {
	g.t.Helper()
	c, err := g.try(command)
	if err != nil {
		g.t.Fatal(err)
	}
	g.t.Cleanup(func() { _ = c.Close() }) // tests close it themselves, too
	return c
}

func (g *guest) try(command string) (stream, error) {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	c, err := vsock.Dial(ctx, g.addr)
	if err != nil {
		return nil, err
	}
	if _, err := io.WriteString(c, command+"\n"); err != nil {
		return nil, errors.Join(err, c.Close())
	}
	return c.(stream), nil
}

// output runs a command to its end.
func (g *guest) output(command string) string {
	g.t.Helper()
	b, err := io.ReadAll(g.run(command))
	if err != nil {
		g.t.Fatalf("%s: %v", command, err)
	}
	return string(b)
}

// noise writes n bytes of one kind to w and returns their digest.
func noise(w io.Writer, n, seed int64) ([sha256.Size]byte, error) {
	h := sha256.New()
	_, err := io.Copy(io.MultiWriter(w, h), io.LimitReader(rand.New(rand.NewSource(seed)), n))
	return [sha256.Size]byte(h.Sum(nil)), err
}

// echo sends n bytes to the guest and compares what comes back.
func (g *guest) echo(n, seed int64) error {
	c, err := g.try("echo")
	if err != nil {
		return err
	}
	defer c.Close()
	return roundTrip(c, n, seed, c.CloseWrite)
}

// roundTrip sends n bytes and then the end, and compares what comes back.
func roundTrip(c stream, n, seed int64, end func() error) error {
	type result struct {
		sum [sha256.Size]byte
		err error
	}
	sent := make(chan result, 1)
	go func() {
		sum, err := noise(c, n, seed)
		sent <- result{sum, errors.Join(err, end())}
	}()
	h := sha256.New()
	got, err := io.Copy(h, io.LimitReader(c, n))
	s := <-sent
	if err := errors.Join(err, s.err); err != nil {
		return err
	}
	if got != n || [sha256.Size]byte(h.Sum(nil)) != s.sum {
		return fmt.Errorf("%d bytes came back of %d, or others", got, n)
	}
	return nil
}

// TestVsock tries all that one running guest can show.
func TestVsock(t *testing.T) {
	m, g := boot(t, vmtest.Options{})
	for _, tc := range []struct {
		name string
		run  func(t *testing.T, m *vm.VM, g *guest)
	}{
		{"echo", testEcho}, {"half close", testHalfClose}, {"refused by the guest", testRefusedByGuest},
		{"refused by the node", testRefusedByHost}, {"guest to node", testGuestToHost},
		{"loopback in the guest", testLoopback}, {"throughput", testThroughput}, {"concurrent", testConcurrent},
		{"slow peer", testSlowPeer}, {"cut in mid-stream", testCut}, {"runtimes", testRuntimes},
	} {
		t.Run(tc.name, func(t *testing.T) { tc.run(t, m, &guest{t, g.addr, g.host}) })
	}
	c := g.run("poweroff")
	if b, err := io.ReadAll(c); len(b) > 0 {
		t.Errorf("power off: %q, %v", b, err)
	}
	<-m.Done()
	if err := m.Err(); err != nil {
		t.Errorf("after the power off: %v", err)
	}
}

func testEcho(t *testing.T, _ *vm.VM, g *guest) {
	for _, n := range []int64{0, 1, 4096, 4097, 1 << 20, 5<<20 + 3} {
		if err := g.echo(n, n); err != nil {
			t.Errorf("%d bytes: %v", n, err)
		}
	}
}

func testHalfClose(t *testing.T, _ *vm.VM, g *guest) {
	c := g.run("sink")
	if _, err := noise(c, 300_000, 1); err != nil {
		t.Fatal(err)
	}
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(c); string(b) != "300000\n" || err != nil {
		t.Errorf("the guest counted %q, %v", b, err)
	}
	// The guest first: its end is seen while the other direction is open.
	if s := g.output("source 5"); len(s) != 5 {
		t.Errorf("the guest sent %q", s)
	}
}

func testRefusedByGuest(t *testing.T, m *vm.VM, _ *guest) {
	if _, err := vsock.Dial(t.Context(), m.GuestAddress(4)); !errdefs.IsUnavailable(err) {
		t.Errorf("port without listener: %v", err)
	}
}

func testRefusedByHost(t *testing.T, _ *vm.VM, g *guest) {
	if s := g.output("dial 4"); !strings.Contains(s, "connection reset by peer") {
		t.Errorf("port without listener: %q", s)
	}
}

func testGuestToHost(t *testing.T, _ *vm.VM, g *guest) {
	fromGuest(t, g, func(c stream) error { return roundTrip(c, 2<<20, 7, c.CloseWrite) })
}

// fromGuest has the guest connect to an echo on the node and joins that with a
// command's stream, for use.
func fromGuest(t *testing.T, g *guest, use func(stream) error) {
	t.Helper()
	l, err := vsock.Listen(g.host(vsock.RelayPort))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	c := g.run(fmt.Sprintf("dial %d", vsock.RelayPort))
	if err := l.(interface{ SetDeadline(time.Time) error }).SetDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	peer, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		_, _ = io.Copy(peer, peer) // the other end sees what is missing
		_ = peer.(stream).CloseWrite()
	})
	if err := use(c); err != nil {
		t.Error(err)
	}
	if err := errors.Join(c.Close(), peer.Close()); err != nil {
		t.Error(err)
	}
	wg.Wait()
}

func testLoopback(t *testing.T, _ *vm.VM, g *guest) {
	if s := g.output("loopback"); s != "hello from 1 true" {
		t.Errorf("AF_VSOCK inside the guest: %q", s)
	}
}

// usage is the CPU time of QEMU and of this process, which has the device.
func usage(t *testing.T, m *vm.VM) (qemu, own time.Duration) {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", m.PID()))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, _ := strings.Cut(string(b), ") ")
	var ticks [2]int64 // utime and stime, fields 14 and 15 of proc(5)
	f := strings.Fields(rest)
	if _, err := fmt.Sscan(f[11]+" "+f[12], &ticks[0], &ticks[1]); err != nil {
		t.Fatal(err)
	}
	var r syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &r); err != nil {
		t.Fatal(err)
	}
	return time.Duration(ticks[0]+ticks[1]) * 10 * time.Millisecond,
		time.Duration(r.Utime.Nano() + r.Stime.Nano())
}

// The figures are for people: machines differ, and so does what else they do.
func testThroughput(t *testing.T, m *vm.VM, g *guest) {
	const n = 64 << 20
	var start time.Time
	var qemu0, own0 time.Duration
	begin := func() {
		start = time.Now()
		qemu0, own0 = usage(t, m)
	}
	report := func(what string) {
		qemu, own := usage(t, m)
		mb := float64(n) / 1e6
		t.Logf("%s: %.0f MB/s; CPU for 1000 MB: guest %.1f s, device %.1f s", what, mb/time.Since(start).Seconds(),
			(qemu-qemu0).Seconds()/mb*1000, (own-own0).Seconds()/mb*1000)
	}
	c := g.run(fmt.Sprintf("sink %d", n))
	begin()
	buf := make([]byte, 256<<10)
	for range n / len(buf) {
		if _, err := c.Write(buf); err != nil {
			t.Fatal(err)
		}
	}
	b, err := io.ReadAll(c)
	if string(b) != fmt.Sprintln(n) || err != nil {
		t.Errorf("the guest counted %q, %v", b, err)
	}
	report("node to guest")
	begin()
	if got, err := io.CopyBuffer(struct{ io.Writer }{io.Discard}, g.run(fmt.Sprintf("source %d", n)), buf); got != n || err != nil {
		t.Errorf("the guest sent %d bytes, %v", got, err)
	}
	report("guest to node")
}

// Twenty connections share the queues: none may be left far behind.
func testConcurrent(t *testing.T, _ *vm.VM, g *guest) {
	const conns, each = 20, 4 << 20
	var wg sync.WaitGroup
	var sent [conns]atomic.Int64
	var least atomic.Int64 // of the others, when the first one is done
	var once sync.Once
	for i := range conns {
		wg.Go(func() {
			c, err := g.try("sink")
			if err != nil {
				t.Error(err)
				return
			}
			defer c.Close()
			buf := make([]byte, 64<<10)
			for sent[i].Load() < each {
				if _, err := c.Write(buf); err != nil {
					t.Error(err)
					return
				}
				sent[i].Add(int64(len(buf)))
			}
			once.Do(func() {
				low := int64(each)
				for j := range sent {
					low = min(low, sent[j].Load())
				}
				least.Store(low)
			})
			if err := c.CloseWrite(); err != nil {
				t.Error(err)
			}
			if b, err := io.ReadAll(c); string(b) != fmt.Sprintln(each) || err != nil {
				t.Errorf("the guest counted %q, %v", b, err)
			}
		})
	}
	wg.Wait()
	t.Logf("when the first of %d connections was done, the last had %d%%", conns, 100*least.Load()/each)
	if least.Load() == 0 {
		t.Error("a connection was starved")
	}
	wg.Wait()
	for i := range int64(8) {
		wg.Go(func() {
			if err := g.echo(1<<20, i); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
}

// Peers that do not read, on both sides, hold up nobody else.
func testSlowPeer(t *testing.T, _ *vm.VM, g *guest) {
	for range 5 {
		g.run("source 100000000") // never read here
		c := g.run("dial 2999")   // refused; what it sends is never read there
		if _, err := c.Write(make([]byte, 1<<20)); err != nil {
			t.Logf("refused early: %v", err)
		}
	}
	for i := range int64(5) {
		if err := g.echo(1<<20, i); err != nil {
			t.Error(err)
		}
	}
}

func testCut(t *testing.T, _ *vm.VM, g *guest) {
	var wg sync.WaitGroup
	for w := range 8 {
		wg.Go(func() {
			for i := range 25 {
				if err := g.cut(w, i); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	wg.Wait()
	if err := g.echo(1<<20, 1); err != nil {
		t.Errorf("after 200 cut connections: %v", err)
	}
	// The guest's end of each closes as well.
	var n string
	for range 100 {
		if n = strings.TrimSpace(g.output("sh ls /proc/1/fd | wc -l")); len(n) == 1 || n < "20" && len(n) == 2 {
			return
		}
		time.Sleep(50 * time.Millisecond)
	}
	t.Errorf("init has %s descriptors", n)
}

// cut leaves a connection in the middle of its stream.
func (g *guest) cut(w, i int) error {
	command := []string{"source 100000000", "sink", "echo"}[(w+i)%3]
	c, err := g.try(command)
	if err != nil {
		return err
	}
	if command == "source 100000000" {
		_, err = io.CopyN(io.Discard, c, int64(i*10_000))
	} else {
		_, err = c.Write(make([]byte, i*1000))
	}
	return errors.Join(err, c.Close())
}

// The programs of this machine run in the guest with their libraries.
func testRuntimes(t *testing.T, _ *vm.VM, g *guest) {
	for _, bin := range []string{"/usr/bin/crun", "/usr/sbin/runc"} {
		if _, err := os.Stat(bin); err != nil {
			t.Logf("%s is not here", bin)
			continue
		}
		if s := g.output("sh " + bin + " --version"); !strings.Contains(s, "version") {
			t.Errorf("%s: %s", bin, s)
		}
	}
}

func TestReboot(t *testing.T) {
	m, g := boot(t, vmtest.Options{Reboot: true})
	for i := range 2 {
		idle := g.run("echo")
		g.run("reboot")
		if b, err := io.ReadAll(idle); len(b) > 0 {
			t.Errorf("an idle connection gave %q, %v", b, err)
		}
		g.wait(m)
		if err := g.echo(1<<20, int64(i)); err != nil {
			t.Errorf("after the reboot: %v", err)
		}
	}
	if err := m.Close(); err != nil {
		t.Error(err)
	}
}

// A guest that dies early is reported with its last words.
func TestNotReady(t *testing.T) {
	m := vmtest.Start(t, vmtest.Options{Init: testInit, Cmdline: "rdinit=/nothing"})
	err := m.WaitReady(t.Context(), func(ctx context.Context) error {
		_, err := vsock.Dial(ctx, m.GuestAddress(testPort))
		return err
	})
	if !errdefs.IsUnavailable(err) || !strings.Contains(err.Error(), "Kernel panic") {
		t.Errorf("got %v", err)
	}
}

func TestKill(t *testing.T) {
	m, g := boot(t, vmtest.Options{})
	c := g.run("echo")
	if err := m.Kill(); err != nil {
		t.Error(err)
	}
	if b, err := io.ReadAll(c); len(b) > 0 {
		t.Errorf("a connection of the dead machine gave %q, %v", b, err)
	}
	if _, err := vsock.Dial(t.Context(), g.addr); !errdefs.IsUnavailable(err) {
		t.Errorf("dial after the end: %v", err)
	}
}

// QEMU must not outlive a process that was killed.
func TestParentDies(t *testing.T) {
	if dir := os.Getenv("VMTEST_ORPHAN"); dir != "" {
		boot(t, vmtest.Options{})
		if err := os.WriteFile(filepath.Join(dir, "ready"), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		select {} // killed by the parent
	}
	vmtest.Need(t)
	dir := t.TempDir()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), exe, "-test.run", "^TestParentDies$")
	cmd.Env = append(os.Environ(), "VMTEST_ORPHAN="+dir, "TMPDIR="+dir)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for !exists(filepath.Join(dir, "ready")) {
		if err := cmd.Process.Signal(syscall.Signal(0)); err != nil {
			t.Fatalf("the child ended: %v: %s", err, &out)
		}
		time.Sleep(20 * time.Millisecond)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait()         // "signal: killed"
	for qemuRuns(t, dir) { // bounded by the test's own time
		time.Sleep(20 * time.Millisecond)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// qemuRuns looks for a process whose command line names dir.
func qemuRuns(t *testing.T, dir string) bool {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err == nil && bytes.Contains(b, []byte(dir)) && bytes.Contains(b, []byte("qemu")) {
			return true
		}
	}
	return false
}
