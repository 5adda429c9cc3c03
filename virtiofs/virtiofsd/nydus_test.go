package virtiofsd_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
)

// nydus is the program in the place of nydusd.
type nydus struct {
	*process
	socket, api string
	client      http.Client
}

func startNydus(t *testing.T, bin string, extra ...string) *nydus {
	t.Helper()
	dir := t.TempDir()
	n := &nydus{socket: filepath.Join(dir, "s"), api: filepath.Join(dir, "a")}
	leaveStale(t, n.socket)
	leaveStale(t, n.api)
	n.process = start(t, bin, append([]string{"virtiofs", "--hybrid-mode", "--log-level", "info", "--apisock", n.api, "--sock", n.socket}, extra...)...)
	n.client = http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", n.api)
		}}}
	return n
}

// send returns the status of an answer and its text.
func (n *nydus) send(t *testing.T, method, path, body string) (int, string) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, "http://unix/api/v1/"+path, strings.NewReader(body))
	if err != nil {
		t.Fatal(err)
	}
	resp, err := n.client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	b, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return resp.StatusCode, string(b)
}

func (n *nydus) mount(t *testing.T, at, kind, source string) (int, string) {
	t.Helper()
	body, err := json.Marshal(map[string]string{"fs_type": kind, "source": source, "config": "{}"})
	if err != nil {
		t.Fatal(err)
	}
	return n.send(t, http.MethodPost, "mount?mountpoint="+at, string(body))
}

func (n *nydus) terminate(t *testing.T) {
	t.Helper()
	if err := n.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	n.wait(t)
	for _, socket := range []string{n.socket, n.api} {
		if _, err := os.Lstat(socket); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: %v", socket, err)
		}
	}
}

// The order of both runtimes: state, Kata's directory, then the VMM, images at any
// time.
func TestNydusProgram(t *testing.T) {
	bin := build(t)
	n := startNydus(t, bin, "--passthrough")
	for _, socket := range []string{n.socket, n.api} {
		if st, err := os.Stat(socket); err != nil || st.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v", socket, st, err)
		}
	}
	if status, text := n.send(t, http.MethodGet, "daemon", ""); status != http.StatusOK || !strings.Contains(text, `"state":"RUNNING"`) {
		t.Errorf("%d %s", status, text)
	}
	shared, image := t.TempDir(), t.TempDir()
	good := func(what string) func(int, string) {
		return func(status int, text string) {
			t.Helper()
			if status != http.StatusNoContent || text != "" {
				t.Errorf("%s: %d %s", what, status, text)
			}
		}
	}
	bad := func(want int) func(int, string) {
		return func(status int, text string) {
			t.Helper()
			if status != want || !strings.Contains(text, `"message":`) {
				t.Errorf("%d %s, want %d", status, text, want)
			}
		}
	}
	good("passthrough")(n.mount(t, "/containers", "passthrough_fs", shared))
	good("before the VMM")(n.mount(t, "/rafs/c1/lowerdir", "rafs", image))
	fe := vhosttest.Dial(t, n.socket, 1<<20)
	fe.Negotiate(0)
	n.await(t, "VMM is connected")
	good("after the VMM")(n.mount(t, "/rafs/c2/lowerdir", "rafs", image))
	bad(409)(n.mount(t, "/containers", "passthrough_fs", shared))
	bad(409)(n.mount(t, "/rafs/c2/lowerdir", "rafs", image))
	bad(400)(n.mount(t, "/rafs/c3/lowerdir", "rafs", filepath.Join(image, "none")))
	bad(400)(n.mount(t, "/rafs/c3/lowerdir", "rafs", bin))
	good("unmount")(n.send(t, http.MethodDelete, "mount?mountpoint=/rafs/c1/lowerdir", ""))
	bad(404)(n.send(t, http.MethodDelete, "mount?mountpoint=/rafs/c1/lowerdir", ""))
	good("again")(n.mount(t, "/rafs/c1/lowerdir", "rafs", image))
	if os.Getuid() == 0 {
		enclosed(t, n.child(t), shared)
		good("directory")(n.send(t, http.MethodDelete, "mount?mountpoint=/containers", ""))
		enclosed(t, n.child(t))
	}
	n.terminate(t)
}

func TestNydusProgramWithoutPassthrough(t *testing.T) {
	n := startNydus(t, build(t))
	status, text := n.mount(t, "/containers", "passthrough_fs", t.TempDir())
	if status != http.StatusForbidden || !strings.Contains(text, "start tatami-virtiofsd with --passthrough") {
		t.Errorf("%d %s", status, text)
	}
	if status, text := n.mount(t, "/rafs/c1/lowerdir", "rafs", t.TempDir()); status != http.StatusNoContent {
		t.Errorf("%d %s", status, text)
	}
	n.terminate(t)
}

// enclosed looks at the child: all that is mounted where it is are the directories,
// and it may do no more than own files.
func enclosed(t *testing.T, child int, dirs ...string) {
	t.Helper()
	proc := fmt.Sprintf("/proc/%d/", child)
	table, err := os.ReadFile(proc + "mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	var roots []string
	for line := range strings.Lines(string(table)) {
		f := strings.Fields(line)
		if f[4] != "/" {
			t.Errorf("mounted: %s", line)
		}
		if f[3] != "/" {
			roots = append(roots, f[3])
		}
	}
	if !slices.EqualFunc(roots, dirs, strings.HasSuffix) && !slices.EqualFunc(dirs, roots, strings.HasSuffix) {
		t.Errorf("mounted are %q, want %q", roots, dirs)
	}
	noWayUp(t, proc)
	status, err := os.ReadFile(proc + "status")
	if err != nil {
		t.Fatal(err)
	}
	caps := uint64(0)
	for _, c := range []uint{unix.CAP_CHOWN, unix.CAP_DAC_OVERRIDE, unix.CAP_FOWNER, unix.CAP_FSETID, unix.CAP_SETGID, unix.CAP_SETUID, unix.CAP_MKNOD, unix.CAP_SETFCAP} {
		caps |= 1 << c
	}
	for _, want := range []string{"NoNewPrivs:\t1", "Seccomp:\t2", "CapInh:\t0000000000000000", "CapAmb:\t0000000000000000",
		fmt.Sprintf("CapEff:\t%016x", caps), fmt.Sprintf("CapBnd:\t%016x", caps)} {
		if !bytes.Contains(status, []byte(want+"\n")) {
			t.Errorf("the child is without %q:\n%s", want, status)
		}
	}
}

// noWayUp looks at what the child has open: from no directory does a way lead up, to
// /proc/sys or another process.
func noWayUp(t *testing.T, proc string) {
	t.Helper()
	fds, err := filepath.Glob(proc + "fd/*")
	if err != nil || len(fds) == 0 {
		t.Fatal(fds, err)
	}
	dirs := 0
	for _, path := range fds {
		dir, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
		if err != nil {
			continue // no directory, or closed meanwhile
		}
		dirs++
		for _, name := range []string{"..", "../..", "../../.."} {
			for _, file := range []string{"sys/kernel/core_pattern", "etc/passwd", "1/stat"} {
				if fd, err := unix.Openat(dir, name+"/"+file, unix.O_RDONLY|unix.O_CLOEXEC, 0); err == nil {
					to, _ := os.Readlink(path) // for the message only
					t.Errorf("%s, which is %s, leads to %s/%s", path, to, name, file)
					_ = unix.Close(fd) // nothing was written
				}
			}
		}
		_ = unix.Close(dir) // O_PATH
	}
	if dirs == 0 {
		t.Error("the child has no directory open")
	}
}
