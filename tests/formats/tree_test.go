package formats

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tests/treecmp"
)

// TestTorture mounts in each format an image with everything that makes merging
// hard, and compares with the kernel's own overlay of the unpacked layers.
func TestTorture(t *testing.T) {
	need(t, "docker-registry")
	reg, n := startRegistry(t), newNode(t)
	for _, f := range formats {
		t.Run(f.name, func(t *testing.T) {
			needFormat(t, f)
			tars := f.edit(t, torture.Layers())
			got, err := n.mounted(t, f.push(t, reg, tars))
			if err != nil {
				t.Fatal(err)
			}
			// Overlayfs counts names that upper layers hide as links, too.
			compare(t, got, f.expect(overlaid(t, tars)), treecmp.Nlink)
		})
	}
}

// TestDebian does the same with one layer of files that Debian packages
// installed here, and compares with what GNU tar unpacks, link counts included.
func TestDebian(t *testing.T) {
	need(t, "docker-registry", "tar")
	reg, n := startRegistry(t), newNode(t)
	real := debian(t)
	for _, f := range formats {
		t.Run(f.name, func(t *testing.T) {
			needFormat(t, f)
			tars := f.edit(t, [][]byte{real})
			got, err := n.mounted(t, f.push(t, reg, tars))
			if err != nil {
				t.Fatal(err)
			}
			compare(t, got, f.expect(untarred(t, tars[0])))
		})
	}
}

// shown bounds how many differences are worth reading.
const shown = 30

func compare(t *testing.T, got, want treecmp.Tree, ignore ...treecmp.Field) {
	t.Helper()
	if len(want) < 100 {
		t.Fatalf("the tree to compare with has %d names", len(want))
	}
	diff := treecmp.Diff(got, want, ignore...)
	for _, d := range diff[:min(len(diff), shown)] {
		t.Error(d)
	}
	if len(diff) > shown {
		t.Errorf("and %d more differences", len(diff)-shown)
	}
}

// overlaid is the tree that the kernel shows over the unpacked layers, but for
// what is at or below the paths of skip.
func overlaid(t *testing.T, tars [][]byte, skip ...string) treecmp.Tree {
	t.Helper()
	dirs, err := torture.Unpack(torture.TempFS(t), tars)
	if err != nil {
		t.Fatal(err)
	}
	target := t.TempDir()
	if err := torture.MountOverlay(target, dirs); err != nil {
		t.Fatal(err)
	}
	torture.Unmount(t, target)
	return snapshot(t, target, skip...)
}

// debian is a layer of some thousand files of the machine's packages.
func debian(t *testing.T) []byte {
	t.Helper()
	file := filepath.Join(t.TempDir(), "debian.tar")
	run(t, nil, "tar", "--create", "--file", file, "--directory", "/", "--format=pax", "--pax-option=delete=atime,delete=ctime",
		"--xattrs", "--numeric-owner", "--no-recursion", "usr", "usr/share", "usr/bin",
		"--recursion", "usr/share/zoneinfo", "usr/share/perl", "usr/bin/perl")
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// untarred is the tree that GNU tar makes of a layer without whiteouts.
func untarred(t *testing.T, layer []byte) treecmp.Tree {
	t.Helper()
	dir := torture.TempFS(t)
	file, root := filepath.Join(dir, "layer.tar"), filepath.Join(dir, "root")
	if err := os.WriteFile(file, layer, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(root, 0o755); err != nil {
		t.Fatal(err)
	}
	run(t, nil, "tar", "--extract", "--file", file, "--directory", root, "--numeric-owner", "--same-permissions", "--delay-directory-restore", "--xattrs", "--xattrs-include=*")
	tree := snapshot(t, root)
	root0 := tree["."] // the layer has no entry for it
	root0.Sec, root0.Nsec = 0, 0
	tree["."] = root0
	return tree
}

func snapshot(t *testing.T, dir string, skip ...string) treecmp.Tree {
	t.Helper()
	tree, err := treecmp.Snapshot(dir, skip...)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}
