package katavm

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/gob"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/katavm/kata"
	"github.com/tatami-containers/tatami/tests/katavm/shim"
	"github.com/tatami-containers/tatami/tests/treecmp"
	"github.com/tatami-containers/tatami/tools/bundle"
)

// blockRig is a node with a sandbox whose images are disks.
type blockRig struct {
	host         *host
	disk, memory *snapshotter // where writes go
	sandbox      *shim.Sandbox
	img          testImage
	image, upper string // files that are disks: the image, served lazily, and an ext4
}

// TestBlock is the mode block: the lazily served image file as a raw virtio-blk
// disk below the overlay that the agent makes.
func TestBlock(t *testing.T) {
	need(t)
	r := &blockRig{host: startHost(t), img: pushImage(t, startRegistry(t), "block", 7, eStargz)}
	r.disk, r.memory = r.host.snapshotter(t, diskMode), r.host.snapshotter(t, memoryMode)
	r.sandbox = shim.Start(t, shim.Config{ID: sandboxID, RunDir: r.host.kata(), ContainerdState: r.host.containerd()})
	for _, step := range []struct {
		name string
		test func(*testing.T)
	}{
		{"DiskUpper", r.testDiskUpper},
		{"HostDies", r.testHostDies},
		{"MemoryUpper", r.testMemoryUpper},
		{"Removal", r.testRemoval},
	} {
		if !t.Run(step.name, step.test) {
			return
		}
	}
}

// create makes a container and returns its mount list.
func (r *blockRig) create(t *testing.T, id string, s *snapshotter, command ...string) []shim.Mount {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	mounts, err := s.prepare(ctx, id, r.img)
	if err != nil {
		t.Fatal(err)
	}
	spec, err := bundle.Spec(ocispec.ImageConfig{}, command, id)
	if err != nil {
		t.Fatal(err)
	}
	err = r.sandbox.Create(ctx, id, mounts, spec, map[string]string{kata.ContainerType: "container", kata.ImageName: r.img.ref})
	if err != nil {
		t.Fatal(err)
	}
	return mounts
}

const writing = "cat /etc/name; sha256sum </data; echo new >/etc/new; echo more >>/etc/name; rm /etc/alias; cat /etc/new /etc/name; ls /etc"

func written(seed uint64) string {
	return fmt.Sprintf("block\n%x  -\nnew\nblock\nmore\nname\nnew\n", sha256.Sum256([]byte(noise(seed, dataSize))))
}

// testDiskUpper writes to an ext4 disk, and reads a part of the image.
func (r *blockRig) testDiskUpper(t *testing.T) {
	mounts := r.create(t, "disk", r.disk, "/bin/sh", "-c", writing)
	r.upper, r.image = mounts[0].Source, mounts[1].Source
	if got, want := output(t, r.sandbox, "disk"), written(7); got != want {
		t.Errorf("output %q, want %q", got, want)
	}
	fetched := r.host.stats(t).RegistryBytes
	t.Logf("%d bytes from the registry, image of %d", fetched, r.img.size)
	if fetched < dataSize || fetched > r.img.size-unusedSize/2 {
		t.Errorf("%d bytes came from the registry for %d bytes of data in an image of %d", fetched, dataSize, r.img.size)
	}
	shell(t, r.sandbox, "sync")
	if got := run(t, "debugfs", "-R", "cat /upper/etc/new", r.upper); got != "new\n" {
		t.Errorf("on the disk of the upper: %q", got)
	}
}

// testHostDies kills the worker of tatami-host while QEMU reads the image file:
// the disk pauses until the next one serves it.
func (r *blockRig) testHostDies(t *testing.T) {
	r.create(t, "reader", r.memory, "/bin/sh", "-c", "sha256sum </unused")
	start := r.host.stats(t).RegistryBytes
	if err := r.sandbox.Start(t.Context(), "reader"); err != nil {
		t.Fatal(err)
	}
	waitFor(t, func() error {
		if got := r.host.stats(t).RegistryBytes - start; got < 1<<20 {
			return fmt.Errorf("%d bytes read", got)
		}
		return nil
	})
	r.host.killWorker(t)
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	out, err := r.sandbox.Wait(ctx, "reader")
	want := fmt.Sprintf("%x  -\n", sha256.Sum256([]byte(noise(8, unusedSize))))
	if err != nil || out.Code != 0 || string(out.Stdout) != want {
		t.Errorf("%v, exit code %d, stdout %q, want %q, stderr %s", err, out.Code, out.Stdout, want, out.Stderr)
	}
}

// testMemoryUpper runs a second container of the same image file, without a disk
// for writes: it does not see those of the first. Then it tells the tree.
func (r *blockRig) testMemoryUpper(t *testing.T) {
	skip := []string{"proc", "sys", "dev"}
	r.create(t, "memory", r.memory, append([]string{"/treedump", "/"}, skip...)...)
	var got treecmp.Tree
	if err := gob.NewDecoder(bytes.NewReader([]byte(output(t, r.sandbox, "memory")))).Decode(&got); err != nil {
		t.Fatal(err)
	}
	want := r.img.tree(t, skip...)
	delete(got, ".") // the runtime has changed it
	delete(want, ".")
	if diff := treecmp.Diff(got, want); len(diff) > 0 {
		t.Errorf("the tree in the guest is not the image's:\n%s", strings.Join(diff, "\n"))
	}
	r.create(t, "memory-2", r.memory, "/bin/sh", "-c", writing)
	if got, want := output(t, r.sandbox, "memory-2"), written(7); got != want {
		t.Errorf("output %q, want %q", got, want)
	}
}

// testRemoval removes the containers: QEMU lets go of their files. The agent of
// Kata 4.1.0 fails to remove one with a multi-layer root file system: it deletes
// the bundle with all below it before it unmounts the layers that are mounted
// there (LinuxContainer::destroy comes before remove_container_resources). The
// shim unplugs the disks all the same.
func (r *blockRig) testRemoval(t *testing.T) {
	for id, snapshots := range map[string]*snapshotter{"disk": r.disk, "reader": r.memory, "memory": r.memory, "memory-2": r.memory} {
		if err := r.sandbox.Remove(t.Context(), id); err == nil || !strings.Contains(err.Error(), "read-only file system") {
			t.Errorf("%s: %v, want the agent's own failure", id, err)
		}
		snapshots.remove(t, id)
	}
	open := openFiles(t, r.sandbox.PID())
	for _, file := range []string{r.image, r.upper} {
		if slices.Contains(open, file) {
			t.Errorf("QEMU has %s open still", file)
		}
	}
	// The kernel may remember the name of the image file, not more.
	if _, err := os.ReadFile(r.image); err == nil {
		t.Errorf("%s is served still", r.image)
	}
	if _, err := os.Stat(r.upper); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%s is there still (%v)", r.upper, err)
	}
	r.disk.removeImages(t)
	r.memory.removeImages(t)
	r.disk.collect(t, r.host)
}

// openFiles lists what a process has open.
func openFiles(t *testing.T, pid int) []string {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d/fd", pid)
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var files []string
	for _, e := range entries {
		if target, err := os.Readlink(filepath.Join(dir, e.Name())); err == nil { // it may be closed by now
			files = append(files, target)
		}
	}
	return files
}
