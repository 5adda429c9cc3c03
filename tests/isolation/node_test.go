package isolation

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// arm is one of the ways in which an experiment is run.
type arm struct {
	name     string
	storm    bool // others are on the node, too
	settings string
	// silent says that containers do not say their class.
	silent bool
}

var (
	alone       = arm{name: "alone"}
	unprotected = arm{name: "unprotected", storm: true, silent: true, settings: "[schedule]\nenabled = false\n"}
	protected   = arm{name: "protected", storm: true}
	arms        = []arm{alone, unprotected, protected}
)

// class is what the node is told of a container.
func (a arm) class(name string) string {
	if a.silent {
		return ""
	}
	return name
}

// node is a tatami-host.
type node struct {
	*program
	arm      arm
	settings string
	client   *ttrpc.Client
	api      api.NodeService
}

// noFill keeps the node from fetching what a started container does not read: there
// would be no faults at the registry to look at.
const noFill = "[classes.online]\nfill = \"none\"\n"

// newNode starts a node with settings beside those of an arm.
func newNode(tb testing.TB, a arm, s *site, settings string) *node {
	tb.Helper()
	n := &node{program: &program{tb: tb, dir: newDir(tb)}, arm: a}
	n.settings = fmt.Sprintf("version = 1\n%s[log]\nlevel = \"warn\"\nformat = \"text\"\n[registry]\nplain_http = [%q]\n%s", settings, s.address, a.settings)
	n.start()
	tb.Cleanup(n.stop)
	return n
}

func (n *node) start() {
	n.tb.Helper()
	file := filepath.Join(n.dir, "host.toml")
	check(n.tb, os.WriteFile(file, []byte(n.settings), 0o600))
	n.program = start(n.tb, "tatami-host", n.dir, nil, "--config", file, "--root", "DIR/root", "--state", "DIR/state", "--socket", "DIR/socket", "--images-socket", "DIR/images")
	client, err := n.dial(n.tb.Context(), "socket")
	check(n.tb, err)
	n.client = client
	n.api = api.NewNodeClient(n.client)
}

func (n *node) stop() {
	if n.client != nil {
		_ = n.client.Close() // there is nothing to lose
		n.client = nil
	}
	n.end()
}

// restart begins with what the node has on its disk and nothing in memory.
func (n *node) restart() {
	n.tb.Helper()
	n.stop()
	n.start()
}

// prepare is the pull of an image for a container of a class.
func (n *node) prepare(ctx context.Context, ref, class string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	_, err := n.api.Prepare(ctx, &api.PrepareRequest{Reference: ref, Class: n.arm.class(class)})
	return errgrpc.ToNative(err)
}

// usage is what processes have used so far.
type usage struct {
	cpu      time.Duration // user and system
	resident int64         // proportional set size now, bytes
}

// ticks of the clock of /proc/PID/stat in a second: USER_HZ is 100 on every
// architecture of Linux that has a Go compiler.
const ticks = 100

// usage is of the program and of its children, which are its workers.
func (p *program) usage() (sum usage) {
	for _, pid := range family(p.cmd.Process.Pid) {
		stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			continue // it has ended
		}
		fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
		user, _ := strconv.ParseInt(fields[11], 10, 64) // the kernel prints numbers
		system, _ := strconv.ParseInt(fields[12], 10, 64)
		sum.cpu += time.Duration(user+system) * time.Second / ticks
		rollup, _ := os.ReadFile(fmt.Sprintf("/proc/%d/smaps_rollup", pid))
		_, rest, _ := strings.Cut(string(rollup), "\nPss:")
		kib, _ := strconv.ParseInt(strings.Fields(rest + " 0")[0], 10, 64)
		sum.resident += kib << 10
	}
	return sum
}

// family is a process and its descendants.
func family(pid int) []int {
	all := []int{pid}
	threads, _ := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	for _, file := range threads {
		b, _ := os.ReadFile(file)
		for _, f := range strings.Fields(string(b)) {
			if child, err := strconv.Atoi(f); err == nil {
				all = append(all, family(child)...)
			}
		}
	}
	return all
}

// crash kills the node's daemon and starts the next one, which knows the sandboxes of
// the one before.
func (n *node) crash() {
	n.tb.Helper()
	check(n.tb, n.cmd.Process.Signal(syscall.SIGKILL))
	<-n.over
	_ = n.client.Close() // its other end has gone
	n.start()
}

// promoted is how many pieces of work came to be of another class, at all queues.
func (n *node) promoted(tb testing.TB) (sum int64) {
	tb.Helper()
	s, err := n.api.Status(tb.Context(), &api.StatusRequest{})
	check(tb, errgrpc.ToNative(err))
	for _, q := range s.Schedule.GetQueues() {
		for _, c := range q.Classes {
			sum += c.Promoted
		}
	}
	return sum
}
