package e2e

import (
	"bytes"
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// TestBadInput tries what users get wrong and what networks do: an error that
// names the thing, no exit code of success, nothing left behind.
func TestBadInput(t *testing.T) {
	need(t, places[1].needs...)
	r := newRig(t)
	good := layer(t, formats[0].make, busybox(t)...)
	push := func(name string, l registrytest.Layer) registrytest.Pushed {
		return r.reg.PushImage(name, "v1", registrytest.Image{Layers: []registrytest.Layer{l}, Config: shell()})
	}
	push("good", good)
	cut := good
	cut.Blob = append([]byte(nil), good.Blob[:len(good.Blob)/2]...)
	push("truncated", cut) // a well-formed manifest of half a gzip stream
	wrong := push("wrongdigest", layer(t, formats[0].make, append(busybox(t), registrytest.File("x", 0o644, "x"))...))
	r.reg.Fault(wrong.Layers[0].Digest.String(), 0, registrytest.Corrupt(good20(good)))
	zstd := good
	zstd.Blob, zstd.MediaType = []byte("\x28\xb5\x2f\xfd no real frame"), ocispec.MediaTypeImageLayerZstd
	push("zstd", zstd)
	r.reg.PushImage("nocommand", "v1", registrytest.Image{Layers: []registrytest.Layer{good}})
	missing := digest.FromString("not there")

	for _, c := range []struct {
		name  string
		image string
		flags []string
		cmd   []string
		want  []string // all of them in the message
	}{
		{"unknown tag", r.ref("good:v2"), nil, nil, []string{"good:v2", "not found"}},
		{"unknown digest", r.ref("good@" + missing.String()), nil, nil, []string{missing.String(), "not found"}},
		{"not a reference", "Not/A Reference", nil, nil, []string{"Not/A Reference"}},
		{"unreachable registry", "127.0.0.1:1/x:y", nil, nil, []string{"127.0.0.1:1", "refused"}},
		{"truncated layer", r.ref("truncated:v1"), nil, nil, []string{digest.FromBytes(cut.Blob).String()}},
		{"corrupt layer", r.ref("wrongdigest:v1"), nil, nil, []string{wrong.Layers[0].Digest.String()}},
		{"unsupported media type", r.ref("zstd:v1"), nil, nil, []string{"zstd"}},
		{"no command", r.ref("nocommand:v1"), nil, nil, []string{"neither entrypoint nor command"}},
		{"command not in the image", r.ref("good:v1"), nil, []string{"/bin/nothing"}, []string{"/bin/nothing"}},
		{"other platform", r.ref("good:v1"), []string{"--platform", "linux/s390x"}, nil, []string{"s390x"}},
		{"bad flag", r.ref("good:v1"), []string{"--mount-path", "magic"}, nil, []string{"magic", "auto"}},
		{"no tatami-host there", r.ref("good:v1"), []string{"--host-socket", "/nonexistent/host.sock"}, nil, []string{"/nonexistent/host.sock", "running"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			res := r.run(job{vm: "none", image: c.image, flags: c.flags, command: c.cmd})
			if res.code != 125 {
				t.Errorf("exit code %d", res.code)
			}
			for _, w := range c.want {
				if !strings.Contains(res.stderr, w) {
					t.Errorf("the message does not tell %q: %s", w, res.stderr)
				}
			}
			if strings.Contains(res.stderr, "panic") {
				t.Errorf("panic:\n%s", res.stderr)
			}
		})
	}
	// None of it spoiled the node.
	if res := r.must(job{vm: "none", image: r.ref("good:v1"), command: []string{"/bin/echo", "fine"}}); res.stdout != "fine\n" {
		t.Errorf("afterwards: %q", res.stdout)
	}
}

// good20 is an offset well inside a blob.
func good20(l registrytest.Layer) int64 { return int64(len(l.Blob) / 5) }

// TestFullDisk prepares an image on a node without room for it.
func TestFullDisk(t *testing.T) {
	need(t, places[1].needs...)
	r := newRig(t)
	small := t.TempDir()
	if err := syscall.Mount("tmpfs", small, "tmpfs", 0, "size=4m"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Unmount(small, syscall.MNT_DETACH) })
	l := layer(t, formats[0].make, append(busybox(t), registrytest.File("big", 0o644, noise(6, 16<<20)))...)
	r.reg.PushImage("full", "v1", registrytest.Image{Layers: []registrytest.Layer{l}, Config: shell()})
	res := r.run(job{vm: "none", root: filepath.Join(small, "node"), image: r.ref("full:v1"), command: []string{"/bin/true"}})
	if res.code != 125 || !strings.Contains(res.stderr, "no space left") {
		t.Errorf("exit code %d: %s", res.code, res.stderr)
	}
}

// TestSignals forwards what the user sends and returns the code that the
// container's end makes of it.
func TestSignals(t *testing.T) {
	for _, p := range places {
		t.Run(p.name, func(t *testing.T) {
			need(t, p.needs...)
			r := newRig(t)
			r.reg.PushImage("signal", "v1", registrytest.Image{Layers: []registrytest.Layer{layer(t, formats[0].make, busybox(t)...)}, Config: shell()})
			c := start(t, r, job{vm: p.vm, source: p.source, image: r.ref("signal:v1"), command: []string{"/bin/sh", "-c", `trap "echo got it; exit 9" TERM; echo ready; while true; do sleep 0.1; done`}})
			c.waitFor(t, "ready\n")
			if err := c.cmd.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if code := c.wait(t); code != 9 || !strings.Contains(c.out.String(), "got it") {
				t.Errorf("exit code %d, output %q %s", code, c.out.String(), c.errs.String())
			}
		})
	}
}

// TestGuestDies kills the virtual machine under a running container.
func TestGuestDies(t *testing.T) {
	need(t, places[0].needs...)
	r := newRig(t)
	r.reg.PushImage("dies", "v1", registrytest.Image{Layers: []registrytest.Layer{layer(t, formats[0].make, busybox(t)...)}, Config: shell()})
	c := start(t, r, job{vm: "qemu", image: r.ref("dies:v1"), command: []string{"/bin/sh", "-c", "echo ready; sleep 1000"}})
	c.waitFor(t, "ready\n")
	killChild(t, c.cmd.Process.Pid, "qemu-system")
	if code := c.wait(t); code != 125 || !strings.Contains(c.errs.String(), "ended by itself") {
		t.Errorf("exit code %d: %s", code, c.errs.String())
	}
}

// TestHostDies kills the node's daemon while the image is being prepared.
func TestHostDies(t *testing.T) {
	need(t, places[1].needs...)
	r := newRig(t)
	l := layer(t, formats[0].make, append(busybox(t), registrytest.File("big", 0o644, noise(7, 8<<20)))...)
	img := r.reg.PushImage("hostdies", "v1", registrytest.Image{Layers: []registrytest.Layer{l}, Config: shell()})
	end := r.reg.Fault(img.Layers[0].Digest.String(), 0, registrytest.Stall(1000, registrytest.Forever))
	c := start(t, r, job{vm: "none", image: r.ref("hostdies:v1"), command: []string{"/bin/true"}})
	for len(r.reg.Requests("/blobs/"+img.Layers[0].Digest.String())) == 0 {
		time.Sleep(10 * time.Millisecond)
	}
	if out, err := exec.CommandContext(t.Context(), "pkill", "-KILL", "-f", "tatami-host --root "+r.root).CombinedOutput(); err != nil {
		t.Fatalf("pkill: %v %s", err, out)
	}
	if code := c.wait(t); code != 125 || !strings.Contains(c.errs.String(), "tatami-host") {
		t.Errorf("exit code %d: %s", code, c.errs.String())
	}
	end()
	// What the killed daemon left behind is no obstacle.
	if res := r.must(job{vm: "none", image: r.ref("hostdies:v1"), command: []string{"/bin/echo", "again"}}); res.stdout != "again\n" {
		t.Errorf("afterwards: %q", res.stdout)
	}
}

// running is a job under way.
type running struct {
	cmd       *exec.Cmd
	out, errs *growing
}

func start(t *testing.T, r *rig, j job) *running {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	t.Cleanup(cancel)
	cmd, _ := r.command(ctx, j)
	c := &running{cmd: cmd, out: newGrowing(), errs: newGrowing()}
	cmd.Stdout, cmd.Stderr = c.out, c.errs
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return c
}

func (c *running) waitFor(t *testing.T, text string) {
	t.Helper()
	deadline := time.After(patience)
	for !strings.Contains(c.out.String(), text) {
		select {
		case <-c.out.more:
		case <-deadline:
			t.Fatalf("no %q in %q; stderr %s", text, c.out.String(), c.errs.String())
		}
	}
}

func (c *running) wait(t *testing.T) int {
	t.Helper()
	_ = c.cmd.Wait() // the exit code is what is asked for
	return c.cmd.ProcessState.ExitCode()
}

// killChild kills the child of pid whose command line has name in it.
func killChild(t *testing.T, pid int, name string) {
	t.Helper()
	if err := syscall.Kill(childOf(t, pid, name), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
}

// childOf is the id of a child with the name in its command line.
func childOf(t *testing.T, pid int, name string) int {
	t.Helper()
	dirs, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		t.Fatal(err)
	}
	for _, d := range dirs {
		stat, _ := os.ReadFile(d) // processes come and go
		_, rest, _ := bytes.Cut(stat, []byte(") "))
		f := strings.Fields(string(rest))
		cmdline, _ := os.ReadFile(filepath.Join(filepath.Dir(d), "cmdline"))
		if len(f) > 1 && f[1] == strconv.Itoa(pid) && bytes.Contains(cmdline, []byte(name)) {
			return atoi(t, filepath.Base(filepath.Dir(d)))
		}
	}
	t.Fatalf("process %d has no child %s", pid, name)
	return 0
}
