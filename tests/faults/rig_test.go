package faults

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

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	"github.com/tatami-containers/tatami/protocols/imageservice/cdh"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// program is a running tatami-host or tatami-guest, in a directory of its own.
type program struct {
	t    *testing.T
	name string
	dir  string
	cmd  *exec.Cmd
}

// run starts a program of ours. prefix goes before its command line, and env to
// its environment.
func run(t *testing.T, name string, prefix, env []string, args ...string) *program {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "faults") //nolint:usetesting // short: sockets are below
	check(t, err)
	p := &program{t: t, name: name, dir: dir}
	line := append(append(prefix, filepath.Join(bin, name)), args...)
	for i := range line {
		line[i] = strings.ReplaceAll(line[i], "DIR", dir)
	}
	log, err := os.Create(p.path("log"))
	check(t, err)
	defer log.Close()
	p.cmd = exec.CommandContext(context.Background(), line[0], line[1:]...)
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stderr = log
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	check(t, p.cmd.Start())
	t.Cleanup(p.end)
	return p
}

func (p *program) path(name string) string { return filepath.Join(p.dir, name) }

func (p *program) log() string {
	b, _ := os.ReadFile(p.path("log")) // none is an empty one
	return string(b)
}

// end ends the program as a service manager does; nothing may stay mounted.
func (p *program) end() {
	check(p.t, p.cmd.Process.Signal(syscall.SIGTERM))
	if err := p.cmd.Wait(); err != nil {
		p.t.Errorf("%s: %v", p.name, err)
	}
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil || strings.Contains(string(b), p.dir) {
		p.t.Errorf("%s has left mounts below %s (%v)", p.name, p.dir, err)
	}
	if p.t.Failed() {
		log := p.log()
		p.t.Logf("%s:\n%s", p.name, log[max(0, len(log)-20000):])
	}
	check(p.t, os.RemoveAll(p.dir))
}

// dial waits for a socket of the program.
func (p *program) dial(name string) *ttrpc.Client {
	p.t.Helper()
	var conn net.Conn
	eventually(p.t, p.name+" listens", func() (ok bool) {
		c, err := new(net.Dialer).DialContext(p.t.Context(), "unix", p.path(name))
		conn = c
		return err == nil
	})
	client := ttrpc.NewClient(conn)
	p.t.Cleanup(func() { _ = client.Close() }) // the test is over
	return client
}

// host is a node.
type host struct {
	*program
	node api.NodeService
}

// startHost runs tatami-host with lines of settings besides those that it needs.
func startHost(t *testing.T, settings string, prefix ...string) *host {
	t.Helper()
	file := filepath.Join(t.TempDir(), "host.toml")
	const lazy = "\n[classes.online]\nfill = \"none\"\n" // or nothing is missing when faults begin
	check(t, os.WriteFile(file, []byte("version = 1\n"+settings+lazy), 0o600))
	p := run(t, "tatami-host", prefix, nil, "--config", file, "--root", "DIR/root", "--state", "DIR/state", "--socket", "DIR/socket", "--images-socket", "DIR/images")
	return &host{p, api.NewNodeClient(p.dial("socket"))}
}

// guest is a tatami-guest on this machine.
type guest struct {
	*program
	host  *host // nil when it asks registries itself
	view  string
	agent cdh.ImagePullServiceService
	api   api.GuestService
}

const sandbox = "one"

// attached starts a guest that reads over the relay of a node.
func (h *host) attached(t *testing.T, args ...string) *guest {
	t.Helper()
	relay, socket := "unix:"+h.path("relay"), "unix:"+h.path("host")
	_, err := h.node.Attach(t.Context(), &api.AttachRequest{Sandbox: sandbox, HostAddress: socket, RelayAddress: relay})
	check(t, err)
	g := startGuest(t, nil, nil, append(args, "--host-address", socket, "--relay-address", relay, "--registry", "false")...)
	g.host = h
	return g
}

// direct starts a guest that has no node.
func direct(t *testing.T, env, prefix []string, args ...string) *guest {
	t.Helper()
	return startGuest(t, env, prefix, append(args, "--host-address", "", "--relay-address", "", "--trust", "image")...)
}

func startGuest(t *testing.T, env, prefix []string, args ...string) *guest {
	t.Helper()
	g := &guest{program: run(t, "tatami-guest", prefix, env, append(args, "--log-level", "debug",
		"--listen", "unix:DIR/guest", "--stream-listen", "unix:DIR/streams", "--cdh-socket", "DIR/cdh", "--state-dir", "DIR/state")...)}
	g.agent = cdh.NewImagePullServiceClient(g.dial("cdh"))
	g.api = api.NewGuestClient(g.dial("guest"))
	return g
}

// pull mounts an image as kata-agent has it done and returns where.
func (g *guest) pull(t *testing.T, id, ref string) (root string, err error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if g.host != nil {
		if _, err := g.host.node.AddContainer(ctx, &api.AddContainerRequest{Sandbox: sandbox, ContainerId: id, Reference: ref}); err != nil {
			return "", errgrpc.ToNative(err)
		}
	}
	bundle := g.path(id)
	if _, err := g.agent.PullImage(ctx, &cdh.ImagePullRequest{ImageUrl: ref, BundlePath: bundle}); err != nil {
		return "", errgrpc.ToNative(err)
	}
	t.Cleanup(func() {
		_, err := g.api.Unmount(context.WithoutCancel(t.Context()), &api.UnmountRequest{Id: id})
		check(t, err)
	})
	return filepath.Join(g.view+bundle, "rootfs"), nil
}

func (g *guest) mustPull(t *testing.T, id, ref string) (root string) {
	t.Helper()
	root, err := g.pull(t, id, ref)
	if err != nil {
		t.Fatalf("pull %s: %v\n%s", ref, err, g.log())
	}
	return root
}

// relayed has lines of settings for a node that is to log what it does.
func relayed(lines ...string) string {
	return "[log]\nlevel = \"debug\"\nformat = \"text\"\n" + strings.Join(lines, "\n") + "\n"
}

// quoted is a line of settings.
func quoted(key, value string) string { return fmt.Sprintf("%s = %q", key, value) }
