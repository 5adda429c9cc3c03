package katavm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/gob"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/katavm/kata"
	"github.com/tatami-containers/tatami/tests/katavm/shim"
	"github.com/tatami-containers/tatami/tests/treecmp"
	"github.com/tatami-containers/tatami/tools/bundle"
)

// sandboxID is that of the pod, and of its pause container.
const sandboxID = "5e9d0e7a4f1b4d0c8a6f2b3c4d5e6f70"

// guestRig is a node with a sandbox in which images are pulled by the guest.
type guestRig struct {
	host      *host
	snapshots *snapshotter
	sandbox   *shim.Sandbox
	one, two  testImage
}

// TestGuest is the mode guest from the pod's sandbox to the removal of its
// containers, in one virtual machine.
func TestGuest(t *testing.T) {
	need(t)
	image, _ := extensionImage(t)
	reg := startRegistry(t)
	r := &guestRig{host: startHost(t), one: pushImage(t, reg, "one", 1, gzipped), two: pushImage(t, reg, "two", 3, gzipped)}
	r.snapshots = r.host.snapshotter(t, guestMode)
	r.sandbox = shim.Start(t, shim.Config{ID: sandboxID, RunDir: r.host.kata(), ContainerdState: r.host.containerd(),
		Extension: image, Cmdline: "tatami.registry=false"})
	for _, step := range []struct {
		name string
		test func(*testing.T)
	}{
		{"Sandbox", r.testSandbox},
		{"Lazy", r.testLazy},
		{"Tree", r.testTree},
		{"Together", r.testTogether},
		{"Foreign", r.testForeign},
		{"WorkerDies", r.testWorkerDies},
		{"HostDies", r.testHostDies},
		{"Removal", r.testRemoval},
	} {
		if !t.Run(step.name, step.test) {
			return
		}
	}
}

// create makes a container of an image.
func (r *guestRig) create(t *testing.T, id string, img testImage, command ...string) {
	t.Helper()
	if err := r.pull(t.Context(), id, img, sandboxID, command...); err != nil {
		t.Fatal(err)
	}
}

// pull makes a container of which containerd says that it belongs to the given
// sandbox.
func (r *guestRig) pull(ctx context.Context, id string, img testImage, sandbox string, command ...string) error {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	mounts, err := r.snapshots.prepare(ctx, id, img)
	if err != nil {
		return err
	}
	spec, err := bundle.Spec(ocispec.ImageConfig{}, command, id)
	if err != nil {
		return err
	}
	return r.sandbox.Create(ctx, id, mounts, spec,
		map[string]string{kata.ContainerType: "container", kata.ImageName: img.ref, kata.SandboxID: sandbox})
}

// output starts a container and returns what it wrote; it must end well.
func output(t *testing.T, s *shim.Sandbox, id string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := s.Start(ctx, id); err != nil {
		t.Fatal(err)
	}
	out, err := s.Wait(ctx, id)
	if err != nil || out.Code != 0 {
		t.Fatalf("%s: %v, exit code %d\nstdout: %s\nstderr: %s", id, err, out.Code, out.Stdout, out.Stderr)
	}
	return string(out.Stdout)
}

// shell is what a script prints in the guest.
func shell(t *testing.T, s *shim.Sandbox, script string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := s.Shell(ctx, script)
	if err != nil || out.Code != 0 {
		t.Fatalf("in the guest: %s: %v, exit code %d\n%s%s", script, err, out.Code, out.Stdout, out.Stderr)
	}
	return string(out.Stdout)
}

// testSandbox makes the pod's own container, of the pause bundle in the
// extension: no image is pulled, the process is that of the bundle.
func (r *guestRig) testSandbox(t *testing.T) {
	spec, err := bundle.Spec(ocispec.ImageConfig{}, []string{"/replaced"}, "pod")
	if err != nil {
		t.Fatal(err)
	}
	mounts, err := r.snapshots.prepare(t.Context(), sandboxID, r.one)
	if err != nil {
		t.Fatal(err)
	}
	err = r.sandbox.Create(t.Context(), sandboxID, mounts, spec, map[string]string{kata.ContainerType: "sandbox", kata.ImageName: r.one.ref})
	if err != nil {
		t.Fatal(err)
	}
	if err := r.sandbox.Start(t.Context(), sandboxID); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() error {
		state := shell(t, r.sandbox, "crun list; for p in /proc/[0-9]*; do tr '\\0' ' ' <$p/cmdline; echo; done 2>/dev/null")
		if !strings.Contains(state, "running") || !strings.Contains(state, "\n/pause \n") {
			return fmt.Errorf("pause does not run:\n%s", state)
		}
		return nil
	})
}

// testLazy runs a process that reads a part of the image.
func (r *guestRig) testLazy(t *testing.T) {
	before := r.host.stats(t).RelayBytes
	r.create(t, "lazy", r.one, "/bin/sh", "-c", "cat /etc/name; sha256sum </data; echo new >/etc/new; cat /etc/new; id -u")
	want := fmt.Sprintf("one\n%x  -\nnew\n0\n", sha256.Sum256([]byte(noise(1, dataSize))))
	if got := output(t, r.sandbox, "lazy"); got != want {
		t.Errorf("output %q, want %q", got, want)
	}
	got := r.host.stats(t).RelayBytes - before
	t.Logf("%d bytes over the relay, image of %d", got, r.one.size)
	if got < dataSize || got > r.one.size-unusedSize/2 {
		t.Errorf("%d bytes over the relay for %d bytes of data in an image of %d", got, dataSize, r.one.size)
	}
	if config := shell(t, r.sandbox, "cat /run/kata-containers/lazy/config.json"); !strings.Contains(config, `"/run/kata-containers/lazy/rootfs"`) {
		t.Errorf("the bundle's config.json is not the host's: %s", config)
	}
}

// testTree compares the whole tree, and with it reads the whole image once more
// through another container: bytes that were there are not fetched again.
func (r *guestRig) testTree(t *testing.T) {
	skip := []string{"proc", "sys", "dev"}
	r.create(t, "tree", r.one, append([]string{"/treedump", "/"}, skip...)...)
	var got treecmp.Tree
	if err := gob.NewDecoder(bytes.NewReader([]byte(output(t, r.sandbox, "tree")))).Decode(&got); err != nil {
		t.Fatal(err)
	}
	want := r.one.tree(t, skip...)
	delete(got, ".") // the runtime has changed it
	delete(want, ".")
	if diff := treecmp.Diff(got, want); len(diff) > 0 {
		t.Errorf("the tree in the guest is not the image's:\n%s", strings.Join(diff, "\n"))
	}
}

// testTogether pulls at the same time what is there and what is not.
func (r *guestRig) testTogether(t *testing.T) {
	pulls := map[string]testImage{"together-1": r.one, "together-2": r.two, "together-3": r.two}
	var wg sync.WaitGroup
	for id, img := range pulls {
		wg.Go(func() {
			if err := r.pull(t.Context(), id, img, sandboxID, "/bin/cat", "/etc/name"); err != nil {
				t.Errorf("%s: %v", id, err)
			}
		})
	}
	wg.Wait()
	if t.Failed() {
		return
	}
	for id, want := range map[string]string{"together-1": "one\n", "together-2": "two\n", "together-3": "two\n"} {
		if got := output(t, r.sandbox, id); got != want {
			t.Errorf("%s: output %q, want %q", id, got, want)
		}
	}
}

// testForeign pulls for a container that belongs to another sandbox.
func (r *guestRig) testForeign(t *testing.T) {
	err := r.pull(t.Context(), "foreign", r.one, "another", "/bin/echo")
	if err == nil || !strings.Contains(err.Error(), "foreign") {
		t.Errorf("pull for a container of another sandbox: %v", err)
	}
	// The agent makes the bundle before it pulls, and leaves it; it must be empty.
	shell(t, r.sandbox, "rmdir /run/kata-containers/foreign")
	r.snapshots.remove(t, "foreign")
}

// testWorkerDies kills the worker of tatami-guest while a container reads, and
// pulls on the agent's old connection afterwards.
func (r *guestRig) testWorkerDies(t *testing.T) {
	r.readThrough(t, "reader-1", func() {
		worker := "grep -alE '[t]atami-guest.*worker' /proc/[0-9]*/cmdline | cut -d/ -f3"
		before := strings.TrimSpace(shell(t, r.sandbox, worker))
		shell(t, r.sandbox, "kill -9 "+before)
		waitFor(t, func() error {
			if now := strings.TrimSpace(shell(t, r.sandbox, worker)); now == before || now == "" {
				return fmt.Errorf("worker %s before, %q now", before, now)
			}
			return nil
		})
	})
	r.create(t, "afterwards-1", r.one, "/bin/cat", "/etc/name")
	if got := output(t, r.sandbox, "afterwards-1"); got != "one\n" {
		t.Errorf("output %q", got)
	}
}

// testHostDies kills the worker of tatami-host: the guest goes on with the next
// one, which finds the sandbox again.
func (r *guestRig) testHostDies(t *testing.T) {
	r.readThrough(t, "reader-2", func() { r.host.killWorker(t) })
	r.create(t, "afterwards-2", r.one, "/bin/cat", "/etc/name")
	if got := output(t, r.sandbox, "afterwards-2"); got != "one\n" {
		t.Errorf("output %q", got)
	}
}

// readThrough has a container read, does something in the middle of it, and
// expects the right bytes.
func (r *guestRig) readThrough(t *testing.T, id string, meanwhile func()) {
	t.Helper()
	r.create(t, id, r.two, "/bin/sh", "-c", "sha256sum </unused")
	shell(t, r.sandbox, "echo 3 >/proc/sys/vm/drop_caches")
	start := r.host.stats(t).RelayBytes
	if err := r.sandbox.Start(t.Context(), id); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() error {
		if got := r.host.stats(t).RelayBytes - start; got < 4<<20 {
			return fmt.Errorf("%d bytes read", got)
		}
		return nil
	})
	meanwhile()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := r.sandbox.Wait(ctx, id)
	want := fmt.Sprintf("%x  -\n", sha256.Sum256([]byte(noise(4, unusedSize))))
	if err != nil || out.Code != 0 || string(out.Stdout) != want {
		t.Fatalf("%v, exit code %d, stdout %q, want %q, stderr %s", err, out.Code, out.Stdout, want, out.Stderr)
	}
}

// testRemoval removes all containers and images and looks for what is left.
func (r *guestRig) testRemoval(t *testing.T) {
	r.create(t, "busy", r.one, "/bin/sleep", "1000")
	if err := r.sandbox.Start(t.Context(), "busy"); err != nil {
		t.Fatal(err)
	}
	for _, id := range []string{"lazy", "tree", "together-1", "together-2", "together-3",
		"reader-1", "afterwards-1", "reader-2", "afterwards-2", "busy", sandboxID} {
		if err := r.sandbox.Remove(t.Context(), id); err != nil {
			t.Fatalf("%s: %v", id, err)
		}
		r.snapshots.remove(t, id)
	}
	waitFor(t, func() error { return leftovers(t, r.sandbox) })
	r.snapshots.removeImages(t)
	r.snapshots.collect(t, r.host)
}

// leftovers tells what of containers is in the guest still.
func leftovers(t *testing.T, s *shim.Sandbox) error {
	t.Helper()
	left := shell(t, s, `
		grep -E ' /run/kata-containers| overlay |/run/tatami/(lower|upper)' /proc/mounts
		ls -d /run/kata-containers/* /run/tatami/mounts/* /run/tatami/upper/* /run/tatami/images/* /run/tatami/lower/* 2>/dev/null
		for l in /sys/block/loop*/loop/backing_file; do cat $l; done 2>/dev/null
		true`)
	if left != "" {
		return fmt.Errorf("left in the guest:\n%s", left)
	}
	return nil
}

// waitFor waits until done returns nil.
func waitFor(t *testing.T, done func() error) {
	t.Helper()
	for deadline := time.Now().Add(30 * time.Second); ; time.Sleep(100 * time.Millisecond) {
		err := done()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
	}
}
