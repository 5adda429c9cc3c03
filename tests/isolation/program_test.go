package isolation

import (
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/ttrpc"
)

// program is a running tatami-host or tatami-guest, in a directory of its own.
type program struct {
	tb   testing.TB
	name string
	dir  string
	cmd  *exec.Cmd
	over chan struct{} // closed when it has ended
	err  error         // why; before over is closed
}

// start starts a program of ours. DIR in its command line is its directory; prefix goes
// before the line.
func start(tb testing.TB, name, dir string, prefix []string, args ...string) *program {
	tb.Helper()
	p := &program{tb: tb, name: name, dir: dir}
	line := append(append([]string{}, prefix...), filepath.Join(bin, name))
	line = append(line, args...)
	for i := range line {
		line[i] = strings.ReplaceAll(line[i], "DIR", dir)
	}
	log, err := os.OpenFile(p.path("log"), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	check(tb, err)
	defer log.Close()
	p.cmd = exec.CommandContext(context.Background(), line[0], line[1:]...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	check(tb, p.cmd.Start())
	p.over = make(chan struct{})
	go func() {
		p.err = p.cmd.Wait()
		close(p.over)
	}()
	return p
}

// newDir makes a directory with a short path: sockets are in it.
func newDir(tb testing.TB) string {
	tb.Helper()
	dir, err := os.MkdirTemp("", "iso") //nolint:usetesting // short: sockets are below
	check(tb, err)
	tb.Cleanup(func() { check(tb, os.RemoveAll(dir)) })
	return dir
}

func (p *program) path(name string) string { return filepath.Join(p.dir, name) }

func (p *program) log() string {
	b, _ := os.ReadFile(p.path("log")) // none is an empty one
	return string(b[:min(len(b), 3000)]) + "\n...\n" + string(b[max(0, len(b)-3000):])
}

// end ends the program as a service manager does; nothing may stay mounted.
func (p *program) end() {
	p.tb.Helper()
	if p.cmd == nil {
		return
	}
	_ = p.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	if <-p.over; p.err != nil {
		p.tb.Errorf("%s: %v\n%s", p.name, p.err, p.log())
	}
	p.cmd = nil
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(b), p.dir+"/") {
		p.tb.Errorf("%s has left mounts below %s (%v)", p.name, p.dir, err)
	}
}

// dial waits for a socket of the program.
func (p *program) dial(ctx context.Context, name string) (*ttrpc.Client, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	for {
		if c, err := new(net.Dialer).DialContext(ctx, "unix", p.path(name)); err == nil {
			return ttrpc.NewClient(c), nil
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-p.over:
			return nil, fmt.Errorf("%s has ended: %w\n%s", p.name, p.err, p.log())
		case <-ctx.Done():
			return nil, fmt.Errorf("%s does not listen at %s: %w\n%s", p.name, p.path(name), ctx.Err(), p.log())
		}
	}
}
