package daemon

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/mount"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/mount/session"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

const unitFile = "../../tools/deploy/systemd/tatami-host.service"

// dropIn is what the unit for users does not have: where the programs of this
// test are, and that nothing of a machine's start comes first.
const dropIn = `[Unit]
DefaultDependencies=no
[Service]
ExecStart=
ExecStart=%[1]s/tatami-host --config %[1]s/host.toml
StandardOutput=append:%[1]s/log
StandardError=append:%[1]s/log
`

// manager is a systemd, the first process of a namespace, that has the host's
// tatami-host as a service.
type manager struct {
	*host
	pid    int // of systemd
	cgroup string
}

// underSystemd makes a node with systemd and the unit that users get.
func underSystemd(t *testing.T, mode session.Mode, snapshotters string) *manager {
	t.Helper()
	needSystemd(t)
	m := &manager{host: newHost(t, mode, ""), cgroup: newCgroup(t)}
	m.run = "/run/tatami-host"
	m.configure(snapshotters)
	units := filepath.Join(m.dir, "units")
	must(t, os.MkdirAll(filepath.Join(units, "tatami-host.service.d"), 0o700),
		os.WriteFile(filepath.Join(units, "test.target"), []byte("[Unit]\nDefaultDependencies=no\nAllowIsolate=yes\n"), 0o600),
		os.WriteFile(filepath.Join(units, "tatami-host.service.d", "test.conf"), fmt.Appendf(nil, dropIn, m.dir), 0o600),
		os.WriteFile(filepath.Join(m.dir, "console"), nil, 0o600))
	m.copy(unitFile, filepath.Join("units", "tatami-host.service"))
	m.copy(m.program, "tatami-host")
	m.copy("/proc/self/exe", "test")
	m.boot()
	return m
}

func needSystemd(t *testing.T) {
	t.Helper()
	needRoot(t)
	if _, err := os.Stat("/lib/systemd/systemd"); err != nil {
		t.Skipf("needs systemd: `make setup` installs it: %v", err)
	}
}

func (m *manager) copy(from, to string) {
	m.t.Helper()
	data, err := os.ReadFile(from)
	must(m.t, err, os.WriteFile(filepath.Join(m.dir, to), data, 0o700))
}

// newCgroup makes a cgroup (version 2), which is gone at the end with all that
// runs in it.
func newCgroup(t *testing.T) string {
	t.Helper()
	table, err := os.ReadFile("/proc/self/mountinfo")
	check(t, err)
	for line := range strings.Lines(string(table)) {
		// proc_pid_mountinfo(5): the fifth field is the mount point, "-" ends
		// the optional ones.
		if fields := strings.Fields(line); strings.Contains(line, " - cgroup2 ") && fields[3] == "/" {
			dir, err := os.MkdirTemp(fields[4], "tatami-test-") //nolint:usetesting // among cgroups
			check(t, err)
			t.Cleanup(func() { removeCgroup(t, dir) })
			return dir
		}
	}
	t.Skip("needs cgroup2: no such file system is mounted")
	return ""
}

func removeCgroup(t *testing.T, dir string) {
	check(t, os.WriteFile(filepath.Join(dir, "cgroup.kill"), []byte("1"), 0))
	var all []string
	check(t, filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.IsDir() {
			all = append(all, path)
		}
		return err
	}))
	slices.Reverse(all)
	for _, path := range all {
		eventually(t, "cgroup "+path+" is empty", func() bool { return unix.Rmdir(path) == nil })
	}
}

// boot starts systemd.
func (m *manager) boot() {
	m.t.Helper()
	group, err := os.Open(m.cgroup)
	check(m.t, err)
	defer group.Close()
	cmd := exec.CommandContext(context.Background(), "/proc/self/exe")
	cmd.Env = append(os.Environ(), roleEnv+"="+initRole, dirEnv+"="+m.dir)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWCGROUP | unix.CLONE_NEWUTS | unix.CLONE_NEWIPC,
		UseCgroupFD: true, CgroupFD: int(group.Fd()), Pdeathsig: syscall.SIGKILL,
	}
	check(m.t, cmd.Start())
	m.pid, m.view = cmd.Process.Pid, fmt.Sprintf("/proc/%d/root", cmd.Process.Pid)
	ended := make(chan struct{})
	go func() { _ = cmd.Wait(); close(ended) }() // it is killed
	m.t.Cleanup(func() {
		_ = cmd.Process.Kill() // it may have ended
		<-ended
		console, _ := os.ReadFile(filepath.Join(m.dir, "console")) // of a failure
		if m.t.Failed() {
			m.t.Logf("systemd: %s\n%s", said.String(), console)
		}
	})
	eventually(m.t, "systemd answers", func() bool {
		select {
		case <-ended:
			m.t.Fatalf("systemd ended: %s", said.String())
		default:
		}
		_, err := m.try("show", "-p", "Version")
		return err == nil
	})
}

// inside makes a command that runs in systemd's namespaces.
func (m *manager) inside(ctx context.Context, name string, args ...string) *exec.Cmd {
	return exec.CommandContext(ctx, "nsenter", append([]string{"-t", fmt.Sprint(m.pid), "-m", "-p", "--", name}, args...)...)
}

// try runs systemctl.
func (m *manager) try(args ...string) (string, error) {
	ctx, cancel := context.WithTimeout(m.t.Context(), 2*patience)
	defer cancel()
	out, err := m.inside(ctx, "systemctl", args...).CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

func (m *manager) systemctl(args ...string) string {
	m.t.Helper()
	out, err := m.try(args...)
	if err != nil {
		status, _ := m.try("status", "-l", "--no-pager", "tatami-host") // for the message
		m.t.Fatalf("systemctl %v: %v: %s\n%s", args, err, out, status)
	}
	return out
}

// property of the service.
func (m *manager) property(name string) string {
	m.t.Helper()
	return m.systemctl("show", "-p", name, "--value", "tatami-host")
}

// mount mounts what a snapshot is made of where containerd would, and returns
// how the place is seen from here.
func (m *manager) mount(key string, mounts []mount.Mount) string {
	m.t.Helper()
	o := order{Mounts: mounts, Target: filepath.Join("/run/containers", key)}
	text, err := json.Marshal(o)
	check(m.t, err)
	cmd := m.inside(m.t.Context(), filepath.Join(m.dir, "test"))
	cmd.Env, cmd.Stdin = append(os.Environ(), roleEnv+"="+mountRole), bytes.NewReader(text)
	if out, err := cmd.CombinedOutput(); err != nil {
		m.t.Fatalf("mount %v: %v: %s", mounts, err, out)
	}
	return m.view + o.Target
}

func (m *manager) unmount(key string, args ...string) {
	m.t.Helper()
	if out, err := m.inside(m.t.Context(), "umount", append(args, filepath.Join("/run/containers", key))...).CombinedOutput(); err != nil {
		m.t.Errorf("umount: %v: %s", err, out)
	}
}

// Containers read their images while systemd restarts, reloads and kills the
// service, with the unit as users have it.
func TestService(t *testing.T) {
	bothModes(t, func(t *testing.T, mode session.Mode) {
		m := underSystemd(t, mode, share+block)
		m.systemctl("start", "tatami-host")
		if m.tryStatus() == nil {
			t.Error("started, but nobody answers")
		}
		m.restricted()
		img, s := m.push("app", 20), m.snapshotter("share")
		s.pull(img)
		root := m.mount("c1", s.run("c1", img))
		r := img.startReaders(t, root, 6)
		r.progress(20)
		slow := &slow{h: m.host, s: s, mount: m.mount, unmount: func(key string) { m.unmount(key) }}
		if mode == session.Direct { // a journal dies with its supervisor
			m.killAll(r, slow, s, img)
		}
		for n := range 3 {
			main := m.property("MainPID")
			slow.during("a restart", func() { m.systemctl("restart", "tatami-host") })
			if now := m.property("MainPID"); now == main {
				t.Errorf("main process %s is %s after a restart", main, now)
			}
			m.goesOn(r, s, img, fmt.Sprintf("restart%d", n))
		}
		main := m.property("MainPID")
		slow.during("a reload", func() { m.systemctl("reload", "tatami-host") })
		eventually(t, "the worker is replaced", func() bool { return strings.Contains(m.log(), "worker is replaced") })
		m.goesOn(r, s, img, "reload")
		if now := m.property("MainPID"); now != main {
			t.Errorf("main process %s is %s after a reload", main, now)
		}
		m.blockDisk(img)
		r.finish()
		m.unmount("c1")
		s.remove("c1")
		m.stopAndStart(s, img)
	})
}

// goesOn looks at everything after the service went.
func (m *manager) goesOn(r *readers, s *client, img image, key string) {
	m.t.Helper()
	r.progress(20)
	var mounts []mount.Mount
	_, err := again(func() (err error) { mounts, err = s.View(s.ctx(), key, img.top()); return err })
	check(m.t, err)
	img.verifyAll(m.t, m.mount(key, mounts))
	m.unmount(key)
	s.remove(key)
	if n := m.property("NFileDescriptorStore"); n != "1" {
		m.t.Errorf("%s descriptors in systemd's store", n)
	}
	if !strings.Contains(m.log(), "FUSE session resumed") {
		m.t.Error("no session was resumed")
	}
	if n := m.reads(); n == 0 {
		m.t.Error("no read reached the worker")
	}
}

// killAll kills supervisor and worker at once, several times.
func (m *manager) killAll(r *readers, slow *slow, s *client, img image) {
	m.t.Helper()
	for n := range 4 {
		slow.during("a kill", m.kill)
		m.goesOn(r, s, img, fmt.Sprintf("kill%d", n))
	}
}

// kill kills all processes of the service and waits until systemd has started
// it again.
func (m *manager) kill() {
	m.t.Helper()
	main := m.property("MainPID")
	m.systemctl("kill", "-s", "KILL", "tatami-host")
	eventually(m.t, "systemd starts it again", func() bool {
		now := m.property("MainPID")
		return now != main && now != "0" && m.property("ActiveState") == "active"
	})
}

// blockDisk makes a disk of mode block, with mkfs.ext4 under the unit's
// restrictions, and reads it as a file.
func (m *manager) blockDisk(img image) {
	m.t.Helper()
	s := m.snapshotter("block")
	s.pull(img)
	mounts := s.run("b1", img)
	for _, c := range [][]string{{"dumpe2fs", "-h", mounts[0].Source}, {"cat", mounts[1].Source}} {
		if err := m.inside(m.t.Context(), c[0], c[1:]...).Run(); err != nil {
			m.t.Errorf("%v: %v", c, err)
		}
	}
	root := m.mount("b1", []mount.Mount{mounts[1]})
	img.verifyAll(m.t, root)
	m.unmount("b1")
	s.remove("b1")
}

// stopAndStart stops the service under a container, after which nothing runs,
// and starts it again.
func (m *manager) stopAndStart(s *client, img image) {
	m.t.Helper()
	img.verifyAll(m.t, m.mount("c2", s.run("c2", img)))
	m.systemctl("stop", "tatami-host")
	if left := m.processes(); len(left) > 0 {
		m.t.Errorf("left after the stop:\n%s", strings.Join(left, "\n"))
	}
	if state := m.property("ActiveState") + " " + m.property("Result"); state != "inactive success" {
		m.t.Errorf("stopped service is %s", state)
	}
	m.systemctl("start", "tatami-host")
	m.unmount("c2", "-l")
	img.verifyAll(m.t, m.mount("c3", s.run("c3", img)))
	m.unmount("c3")
	m.systemctl("stop", "tatami-host")
}

// A session that cannot be resumed is given up: its readers get an error, and
// the next session takes its place with systemd, too.
func TestServiceStartsAnew(t *testing.T) {
	for name, harm := range map[string]func(m *manager) error{
		"no record": func(m *manager) error { return os.Remove(m.view + "/run/tatami-host/fuse.json") },
		"aborted":   func(m *manager) error { return m.inside(m.t.Context(), "umount", "-f", "/run/tatami-host/fuse").Run() },
	} {
		t.Run(name, func(t *testing.T) {
			m := underSystemd(t, session.Direct, share)
			m.systemctl("start", "tatami-host")
			img, s := m.pushSlow("slow", 30), m.snapshotter("share")
			s.pull(img)
			root := m.mount("c1", s.run("c1", img))
			defer m.reg.Fault("/slow/blobs/", 0, registrytest.Delay(slowness))()
			before := len(m.reg.Requests("/slow/blobs/"))
			read := make(chan error, 1)
			go func() { read <- img.verify(root, 0) }()
			eventually(t, "the registry is asked for a file", func() bool { return len(m.reg.Requests("/slow/blobs/")) > before })
			_ = harm(m) // umount says that the rest of it is busy
			m.kill()
			select {
			case err := <-read:
				if err == nil {
					t.Error("a read on a session that is over succeeded")
				}
			case <-time.After(patience):
				t.Fatal("a read hangs")
			}
			m.unmount("c1", "-l")
			next := m.push("app", 31)
			s.pull(next)
			r := next.startReaders(t, m.mount("c2", s.run("c2", next)), 2)
			r.progress(5)
			m.systemctl("restart", "tatami-host")
			m.goesOn(r, s, next, "v")
			r.finish()
			m.unmount("c2")
			m.systemctl("stop", "tatami-host")
		})
	}
}

// restricted looks at whether the unit's hardening is in force.
func (m *manager) restricted() {
	m.t.Helper()
	lists, err := filepath.Glob("/proc/[0-9]*/exe")
	check(m.t, err)
	n := 0
	for _, exe := range lists {
		if path, _ := os.Readlink(exe); path != filepath.Join(m.dir, "tatami-host") { // others may end meanwhile
			continue
		}
		n++
		status := filepath.Join(filepath.Dir(exe), "status")
		if field(m.t, status, "NoNewPrivs") != "1" || field(m.t, status, "Seccomp") != "2" {
			m.t.Errorf("%s: no NoNewPrivileges=, or no filter of system calls", status)
		}
		// What CapabilityBoundingSet= has, as far as this machine has it.
		if got, want := capabilities(m.t, status), capabilities(m.t, "/proc/self/status")&0x920003f; got != want {
			m.t.Errorf("%s: capabilities %x, want %x", status, got, want)
		}
	}
	if n != 2 {
		m.t.Errorf("%d processes, want a supervisor and a worker", n)
	}
}

func capabilities(t *testing.T, status string) uint64 {
	t.Helper()
	set, err := strconv.ParseUint(field(t, status, "CapBnd"), 16, 64)
	check(t, err)
	return set
}

// field reads one of proc_pid_status(5).
func field(t *testing.T, status, name string) string {
	t.Helper()
	text, err := os.ReadFile(status)
	check(t, err)
	_, rest, _ := strings.Cut(string(text), "\n"+name+":\t")
	value, _, _ := strings.Cut(rest, "\n")
	return value
}
