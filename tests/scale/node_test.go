package scale

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tatami-containers/tatami/tools/run"
)

// How long the node's daemon may take to begin and to end.
const hostPatience = 30 * time.Second

// node is a tatami-host in a fresh directory.
type node struct {
	dir      string
	registry string // "host:port"
	cmd      *exec.Cmd
	log      bytes.Buffer // read when the process has ended
	ended    chan error
}

func startNode(ctx context.Context, registry string) (*node, error) {
	dir, err := os.MkdirTemp("", "scale-") // sockets are in it: the path must be short
	if err != nil {
		return nil, err
	}
	n := &node{dir: dir, registry: registry, ended: make(chan error, 1)}
	n.cmd = exec.CommandContext(ctx, filepath.Join(bin, "tatami-host"),
		"--root", n.root(), "--socket", n.socket(), "--plain-http", registry)
	n.cmd.Stdout, n.cmd.Stderr = &n.log, &n.log
	n.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := n.cmd.Start(); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	go func() { n.ended <- n.cmd.Wait() }() // ends with the process
	return n, n.await(ctx)
}

func (n *node) root() string   { return filepath.Join(n.dir, "root") }
func (n *node) socket() string { return filepath.Join(n.dir, "host.sock") }

// await returns when the daemon listens.
func (n *node) await(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, hostPatience)
	defer cancel()
	var d net.Dialer
	for {
		if c, err := d.DialContext(ctx, "unix", n.socket()); err == nil {
			return c.Close()
		}
		select {
		case <-time.After(5 * time.Millisecond):
		case <-ctx.Done():
			return errors.Join(fmt.Errorf("tatami-host does not listen: %w", ctx.Err()), n.close())
		}
	}
}

// close ends the daemon and removes everything.
func (n *node) close() error {
	_ = n.cmd.Process.Signal(syscall.SIGTERM) // it may have ended by itself
	var err error
	select {
	case err = <-n.ended:
	case <-time.After(hostPatience):
		_ = n.cmd.Process.Kill()
		err = fmt.Errorf("tatami-host did not end and was killed: %w", <-n.ended)
	}
	if err != nil {
		err = fmt.Errorf("%w\n%s", err, n.log.Bytes())
	}
	return errors.Join(err, os.RemoveAll(n.dir))
}

// sandboxes starts count sandboxes with a container of the image each, all of them at
// the same time, and returns their reports when the last has ended. Every container
// has to print what the application prints.
func (n *node) sandboxes(ctx context.Context, count int, image string, a *application, more func(*run.Options)) ([]*run.Report, error) {
	reports := make([]*run.Report, count)
	var g errgroup.Group
	for i := range reports {
		g.Go(func() (err error) {
			reports[i], err = n.sandbox(ctx, image, a, more)
			if err != nil {
				err = fmt.Errorf("sandbox %d of %d: %w", i+1, count, err)
			}
			return err
		})
	}
	return reports, g.Wait()
}

func (n *node) sandbox(ctx context.Context, image string, a *application, more func(*run.Options)) (*run.Report, error) {
	var out, errs bytes.Buffer
	o := run.Options{Image: image, Args: command, VM: run.None, Source: run.SourceRelay, Socket: n.socket(), Root: n.root(),
		PlainHTTP: []string{n.registry}, Stdout: &out, Stderr: &errs}
	if more != nil {
		more(&o)
	}
	r, err := run.Run(ctx, o)
	if err == nil && (r.ExitCode != 0 || out.String() != a.prints) {
		err = fmt.Errorf("exit code %d, stdout %q, want %q; stderr %q", r.ExitCode, out.String(), a.prints, errs.String())
	}
	return r, err
}

// usage is what a process has used so far.
type usage struct {
	cpu      time.Duration // user and system
	resident int64         // the most that it had in memory, bytes
}

// ticks of the clock of /proc/PID/stat in a second: USER_HZ is 100 on every
// architecture of Linux that has a Go compiler.
const ticks = 100

// usage reads proc_pid_stat(5) and proc_pid_status(5).
func (n *node) usage() (usage, error) {
	dir := "/proc/" + strconv.Itoa(n.cmd.Process.Pid)
	stat, err := os.ReadFile(dir + "/stat")
	if err != nil {
		return usage{}, err
	}
	fields := strings.Fields(string(stat[bytes.LastIndexByte(stat, ')')+1:]))
	user, err1 := strconv.ParseInt(fields[11], 10, 64)
	system, err2 := strconv.ParseInt(fields[12], 10, 64)
	status, err3 := os.ReadFile(dir + "/status")
	_, rest, _ := strings.Cut(string(status), "\nVmHWM:")
	kib, err4 := strconv.ParseInt(strings.Fields(rest + " -")[0], 10, 64)
	return usage{cpu: time.Duration(user+system) * time.Second / ticks, resident: kib << 10}, errors.Join(err1, err2, err3, err4)
}
