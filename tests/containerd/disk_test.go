package containerd

import (
	"encoding/json"
	"fmt"
	"strconv"
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
			n := newRig(t, w)
			app := n.reg.pushApp(t, "app", 1)
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
			n.containerd.end(t, syscall.SIGTERM)
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
			until(t, func() error { return n.onlyPause(t, "tatami") })
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
