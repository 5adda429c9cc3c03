package e2e

import (
	"crypto/sha256"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// overVirtioFS fails when the guest's kernel did not read the node's file by
// itself.
func (res result) overVirtioFS(t *testing.T) {
	t.Helper()
	g := res.report.Guest
	if res.report.Source != "virtio-fs" || g.Requests["virtio-fs"] != 1 || g.Sources["relay"] > 0 {
		t.Errorf("source %q, requests %v, bytes %v", res.report.Source, g.Requests, g.Sources)
	}
}

// TestOverVirtioFS starts an eStargz image that the node has nothing of, by the
// source that is taken when the user says nothing: the node fetches while the
// guest reads. A second machine needs the registry no more.
func TestOverVirtioFS(t *testing.T) {
	need(t, places[2].needs...)
	r := newRig(t)
	data := noise(1, 24<<20)
	l := layer(t, formats[2].make, append(busybox(t), registrytest.File("data", 0o644, data), registrytest.File("unused", 0o644, noise(2, 32<<20)))...)
	img := r.reg.PushImage("cold", "v1", registrytest.Image{Layers: []registrytest.Layer{l}, Config: shell()})
	j := job{vm: "qemu", source: "auto", image: r.ref("cold:v1"), command: []string{"/bin/sha256sum", "/data"}}
	want := fmt.Sprintf("%x  /data\n", sha256.Sum256([]byte(data)))
	cold := r.must(j)
	cold.overVirtioFS(t)
	size := int64(len(l.Blob))
	if got := r.reg.BlobStats(img.Layers[0].Digest).Bytes; cold.stdout != want || got < int64(len(data)) || got > size*9/10 {
		t.Errorf("stdout %q, want %q; %d bytes fetched of %d", cold.stdout, want, got, size)
	}
	if f := cold.report.FetchedAtMount; f > size/4 {
		t.Errorf("%d bytes were fetched at the mount", f)
	}
	r.reg.Close()
	warm := r.must(j)
	warm.overVirtioFS(t)
	if warm.stdout != want {
		t.Errorf("without the registry: %q", warm.stdout)
	}
	t.Logf("the guest's daemon has %d KiB resident", warm.report.Guest.Resident>>10)
}

// TestTwoMachinesOverVirtioFS reads one image in two machines at a time.
func TestTwoMachinesOverVirtioFS(t *testing.T) {
	need(t, places[2].needs...)
	r := newRig(t)
	data := noise(3, 8<<20)
	l := layer(t, formats[2].make, append(busybox(t), registrytest.File("data", 0o644, data))...)
	img := r.reg.PushImage("two", "v1", registrytest.Image{Layers: []registrytest.Layer{l}, Config: shell()})
	var both sync.WaitGroup
	results := make([]result, 2)
	for i := range results {
		both.Go(func() {
			results[i] = r.run(job{vm: "qemu", source: "virtiofs", image: r.ref("two:v1"), command: []string{"/bin/sha256sum", "/data"}})
		})
	}
	both.Wait()
	for i, res := range results {
		if want := fmt.Sprintf("%x  /data\n", sha256.Sum256([]byte(data))); res.code != 0 || res.stdout != want {
			t.Errorf("machine %d: exit code %d, stdout %q, want %q\n%s", i, res.code, res.stdout, want, res.stderr)
		}
		res.overVirtioFS(t)
	}
	if got := r.reg.BlobStats(img.Layers[0].Digest).Bytes; got > int64(len(l.Blob))*11/10 {
		t.Errorf("%d bytes came from the registry, the blob has %d", got, len(l.Blob))
	}
}

// TestVirtioFSDaemonDies ends the run with a reason: a guest that has lost its
// file system would hang.
func TestVirtioFSDaemonDies(t *testing.T) {
	need(t, places[2].needs...)
	r := newRig(t)
	r.reg.PushImage("lost", "v1", registrytest.Image{Layers: []registrytest.Layer{layer(t, formats[0].make, busybox(t)...)}, Config: shell()})
	c := start(t, r, job{vm: "qemu", source: "virtiofs", image: r.ref("lost:v1"), command: []string{"/bin/sh", "-c", "echo ready; sleep 1000"}})
	c.waitFor(t, "ready\n")
	killChild(t, c.cmd.Process.Pid, "tatami-virtiofsd")
	if code := c.wait(t); code != 125 || !strings.Contains(c.errs.String(), "tatami-virtiofsd") || !strings.Contains(c.errs.String(), "ended") {
		t.Errorf("exit code %d: %s", code, c.errs.String())
	}
}

// TestHostRestartsUnderVirtioFS ends the node's daemon while a guest reads what
// the node has yet to fetch: reads wait for the next daemon, none fails.
func TestHostRestartsUnderVirtioFS(t *testing.T) {
	need(t, places[2].needs...)
	r := newRig(t)
	entries, sums := slowEntries(t)
	l := layer(t, formats[2].make, entries...)
	img := r.reg.PushImage("slow", "v1", registrytest.Image{Layers: []registrytest.Layer{l}, Config: shell()})
	n := &hostNode{rig: r, dir: t.TempDir()}
	n.start()
	n.dial(filepath.Join(n.root, "tatami-host.sock"))
	c := start(t, r, job{vm: "qemu", source: "virtiofs", image: r.ref("slow:v1"),
		flags:   []string{"--host-socket", filepath.Join(n.root, "tatami-host.sock")},
		command: []string{"/bin/sh", "-c", "for f in /slow/*; do sha256sum $f || bad=1; done; echo exit $bad"}})
	for _, sig := range []syscall.Signal{syscall.SIGKILL, syscall.SIGTERM} {
		lines := strings.Count(c.out.String(), "\n") + 3
		for end := time.Now().Add(patience); strings.Count(c.out.String(), "\n") < lines; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) || strings.Contains(c.errs.String(), "tatami run: ") {
				t.Fatalf("the guest does not get on: %q %s", c.out.String(), c.errs.String())
			}
		}
		n.end(sig)
		time.Sleep(300 * time.Millisecond)
		if strings.Contains(c.out.String(), "exit") {
			t.Fatal("all was read without the node")
		}
		n.start()
	}
	c.waitFor(t, "exit")
	c.wait(t)
	if got, want := c.out.String(), sums+"exit\n"; got != want {
		t.Errorf("the guest read\n%s\nwant\n%s\n%s", got, want, c.errs.String())
	}
	if got := r.reg.BlobStats(img.Layers[0].Digest).Bytes; got < slowFiles*slowSize {
		t.Errorf("%d bytes came from the registry", got)
	}
}

// TestVirtioFSChildDies kills the process that has the guest, and once the node's
// daemon with it, while the guest reads: reads wait for the next, none fails.
func TestVirtioFSChildDies(t *testing.T) {
	need(t, places[2].needs...)
	r := newRig(t)
	entries, sums := slowEntries(t)
	r.reg.PushImage("slow", "v1", registrytest.Image{Layers: []registrytest.Layer{layer(t, formats[2].make, entries...)}, Config: shell()})
	n := &hostNode{rig: r, dir: t.TempDir()}
	n.start()
	n.dial(filepath.Join(n.root, "tatami-host.sock"))
	c := start(t, r, job{vm: "qemu", source: "virtiofs", image: r.ref("slow:v1"),
		flags:   []string{"--host-socket", filepath.Join(n.root, "tatami-host.sock")},
		command: []string{"/bin/sh", "-c", "for f in /slow/*; do sha256sum $f || bad=1; done; echo exit $bad"}})
	for i := range 3 {
		lines := strings.Count(c.out.String(), "\n") + 2
		for end := time.Now().Add(patience); strings.Count(c.out.String(), "\n") < lines; time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) || strings.Contains(c.errs.String(), "tatami run: ") {
				t.Fatalf("the guest does not get on: %q %s", c.out.String(), c.errs.String())
			}
		}
		killChild(t, childOf(t, c.cmd.Process.Pid, "tatami-virtiofsd"), "tatami-virtiofsd")
		if i == 2 {
			n.end(syscall.SIGKILL)
			n.start()
		}
	}
	c.waitFor(t, "exit")
	c.wait(t)
	if got, want := c.out.String(), sums+"exit\n"; got != want {
		t.Errorf("the guest read\n%s\nwant\n%s\n%s", got, want, c.errs.String())
	}
}

// slowEntries are a shell and files that take a while, with the output of sha256sum
// for them.
func slowEntries(t *testing.T) ([]registrytest.Entry, string) {
	t.Helper()
	entries := busybox(t)
	var sums strings.Builder
	for i := range slowFiles {
		name, data := fmt.Sprintf("slow/f%02d", i), noise(uint64(i), slowSize)
		entries = append(entries, registrytest.File(name, 0o644, data))
		fmt.Fprintf(&sums, "%x  /%s\n", sha256.Sum256([]byte(data)), name)
	}
	return entries, sums.String()
}

// TestNoFileOnVirtioFS takes the relay where the node does not show the image: the
// socket is that of a node that knows nothing of the sandbox.
func TestNoFileOnVirtioFS(t *testing.T) {
	need(t, places[2].needs...)
	r := newRig(t)
	r.reg.PushImage("none", "v1", registrytest.Image{Layers: []registrytest.Layer{layer(t, formats[0].make, busybox(t)...)}, Config: shell()})
	other := &hostNode{rig: &rig{t: t, root: t.TempDir()}, dir: t.TempDir()}
	other.start()
	socket := filepath.Join(other.root, "images.sock")
	for end := time.Now().Add(patience); ; time.Sleep(5 * time.Millisecond) {
		if _, err := os.Stat(socket); err == nil {
			break
		}
		if time.Now().After(end) {
			t.Fatalf("no %s: %s", socket, other.hostLog())
		}
	}
	res := r.must(job{vm: "qemu", source: "virtiofs", flags: []string{"--images-socket", socket}, image: r.ref("none:v1"), command: []string{"/bin/echo", "hi"}})
	if res.stdout != "hi\n" || res.report.Source != "relay" || res.report.Guest.Sources["relay"] == 0 || res.report.Guest.Requests["virtio-fs"] > 0 {
		t.Errorf("stdout %q, report %+v", res.stdout, res.report)
	}
}

// TestVirtioFSThatCannotBe says what is missing when the user insists.
func TestVirtioFSThatCannotBe(t *testing.T) {
	need(t, places[2].needs...)
	r := newRig(t)
	r.reg.PushImage("none", "v1", registrytest.Image{Layers: []registrytest.Layer{layer(t, formats[0].make, busybox(t)...)}, Config: shell()})
	j := job{vm: "qemu", source: "virtiofs", flags: []string{"--images-socket", "/none/images.sock"}, image: r.ref("none:v1"), command: []string{"/bin/echo", "hi"}}
	if res := r.run(j); res.code != 125 || !strings.Contains(res.stderr, "/none/images.sock") || !strings.Contains(res.stderr, "--source relay") {
		t.Errorf("exit code %d: %s", res.code, res.stderr)
	}
	j.source = "auto"
	if res := r.must(j); res.stdout != "hi\n" || res.report.Source != "relay" {
		t.Errorf("stdout %q, report %+v", res.stdout, res.report)
	}
}
