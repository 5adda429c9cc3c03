package containerd

import (
	"encoding/json"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// slack is how much two measures of disk use may differ, in bytes: metadata
// files that grow, directories.
const slack = 2 << 20

// TestDisk follows what an image takes on disk: nothing after its removal, and
// meanwhile what CRI says.
func TestDisk(t *testing.T) {
	for _, w := range []way{ways[0], ways[2]} {
		t.Run(w.name, func(t *testing.T) {
			reg := startRegistry(t)
			app := reg.pushApp(t, "app", 1)
			n, ctd, _ := shareNode(t, w, reg)
			pod := n.pod(t, "first", "") // the sandbox's image is there from now on
			before := n.usage(t, n.hostRoot())

			n.crictl(t, "pull", app.ref)
			id := n.create(t, pod, container{name: "disk", image: app.ref})
			n.exec(t, id, "sha256sum", "/data/large")
			full := n.usage(t, n.hostRoot())
			if full < before+largeSize {
				t.Errorf("%d bytes on disk after a file of %d was read, %d before", full, largeSize, before)
			}
			// containerd asks for the usage of an image's snapshots once, when it
			// sees them first (internal/cri/server/images/snapshots.go, sync).
			ctd.end(t, syscall.SIGTERM)
			n.restartContainerd(t)
			until(t, func() error { return n.checkImageFS(t, w) })

			n.crictl(t, "stop", "--timeout", "0", id)
			n.crictl(t, "rm", id)
			n.crictl(t, "rmi", app.ref)
			until(t, func() error {
				if now := n.usage(t, n.hostRoot()); now > before+slack {
					return fmt.Errorf("%d bytes on disk after the image's removal, %d before its pull", now, before)
				}
				return nil
			})
			n.removePod(t, pod)
			if keys := n.snapshotKeys(t, "k8s.io", "tatami"); len(keys) != 1 {
				t.Errorf("snapshots %v are left, want only that of the sandbox's image", keys)
			}
		})
	}
}

// checkImageFS compares what `crictl imagefsinfo` says with the disk.
func (n *node) checkImageFS(t *testing.T, w way) error {
	t.Helper()
	fs := n.imageFS(t)
	root := n.proxyOf("tatami").Root
	if releases[w.rel].major > 1 && fs.mountpoint != root {
		return fmt.Errorf("file system of images is %s, want %s", fs.mountpoint, root)
	}
	if want := n.usage(t, n.hostRoot()); fs.used < want-slack || fs.used > want+slack {
		return fmt.Errorf("images use %d bytes, on disk are %d", fs.used, want)
	}
	return nil
}

// imageFS is one file system of `crictl imagefsinfo`.
type imageFS struct {
	mountpoint string
	used       int64
}

// imageFS returns the first one, which is all that kubelet looks at.
func (n *node) imageFS(t *testing.T) imageFS {
	t.Helper()
	var info struct {
		Status struct {
			ImageFilesystems []struct {
				FsID      struct{ Mountpoint string }
				UsedBytes struct{ Value string }
			}
		}
	}
	text := n.crictl(t, "imagefsinfo", "--output", "json")
	if err := json.Unmarshal([]byte(text), &info); err != nil || len(info.Status.ImageFilesystems) == 0 {
		t.Fatalf("crictl imagefsinfo: %v: %s", err, text)
	}
	first := info.Status.ImageFilesystems[0]
	used, err := strconv.ParseInt(first.UsedBytes.Value, 10, 64)
	if err != nil {
		t.Fatalf("crictl imagefsinfo: %v: %s", err, text)
	}
	return imageFS{first.FsID.Mountpoint, used}
}

// TestImageStaysForOthers removes an image that shares a layer with another one,
// and a third name of the same image.
func TestImageStaysForOthers(t *testing.T) {
	reg := startRegistry(t)
	one, two := reg.pushApp(t, "one", 1), reg.pushApp(t, "two", 2) // the same tools
	n, _, _ := shareNode(t, ways[0], reg)
	again := reg.pushApp(t, "again", 1)
	for _, ref := range []string{one.ref, two.ref, again.ref} {
		n.crictl(t, "pull", ref)
	}
	n.crictl(t, "rmi", one.ref) // removes all names of the image
	if left := n.images(t); slices.Contains(left, one.ref) || slices.Contains(left, again.ref) || !slices.Contains(left, two.ref) {
		t.Errorf("images left: %s", strings.Join(left, " "))
	}
	pod := n.pod(t, "others", "")
	id := n.create(t, pod, container{name: "others", image: two.ref})
	if got, want := n.exec(t, id, "sha256sum", "/data/large"), largeSum(2); got != want {
		t.Errorf("large file: %s, want %s", got, want)
	}
	n.removePod(t, pod)
}
