package containerd

import (
	"errors"
	"strings"
	"testing"
)

// notFound is in containerd's error when a snapshotter needs a layer's content
// and the content store does not have it.
const notFound = "content digest"

// TestDiscardedLayers shows without us what needs discard_unpacked_layers = false
// on a node with two snapshotters: the second one unpacks what the first one's
// pull has left in the content store.
func TestDiscardedLayers(t *testing.T) {
	for _, discard := range []bool{false, true} {
		name, lines := "kept", "discard_unpacked_layers = false"
		if discard {
			name, lines = "discarded", "discard_unpacked_layers = true"
		}
		t.Run(name, func(t *testing.T) {
			reg := startRegistry(t)
			app := reg.pushApp(t, "app", 1)
			n := newNode(t, releases[0])
			n.containerd(t, setup{Pause: reg.pushPause(t), Snapshotter: "overlayfs", Lines: lines,
				Handlers: []handler{{"other", "native"}}})
			n.crictl(t, "pull", app.ref)
			if discard {
				until(t, func() error { return n.collected(t, app) })
			}
			n.pullFor(t, reg.host+"/pause:1", "other") // or the sandbox's image is missed first
			pod := n.pod(t, "other", "other")
			_, err := n.tryCreate(t, pod, container{name: "other", image: app.ref})
			if failed := err != nil && strings.Contains(err.Error(), notFound); failed != discard || err != nil && !failed {
				t.Errorf("the second snapshotter's container: %v", err)
			}
		})
	}
}

// collected is an error as long as containerd has the image's upper layer.
func (n *node) collected(t *testing.T, app image) error {
	t.Helper()
	if n.hasContent(t, "k8s.io", app.layers[1]) {
		return errors.New("the layer is still in the content store")
	}
	return nil
}

// TestSideBySide runs images under overlayfs, the default, and under us, on one
// node and at a time.
func TestSideBySide(t *testing.T) {
	for _, w := range ways[:2] { // containerd 1.6 has no snapshotter per handler
		t.Run(w.name, func(t *testing.T) {
			reg := startRegistry(t)
			first, second := reg.pushApp(t, "first", 1), reg.pushApp(t, "second", 2)
			need(t, "mount.fuse")
			n := newNode(t, releases[w.rel])
			n.host(t, share)
			n.containerd(t, setup{Pause: reg.pushPause(t), Snapshotter: "overlayfs", Transfer: w.transfer,
				Proxies: []proxy{n.proxyOf("tatami")}, Handlers: []handler{{"lazy", "tatami"}}})
			lazy := n.pod(t, "lazy", "lazy") // pulls the sandbox's image for its handler
			_, err := n.try(t, n.crictlArgs("runp", n.podConfig(t, "plain", ""))...)
			if err == nil || !strings.Contains(err.Error(), notFound) {
				t.Errorf("a sandbox on overlayfs without the layers: %v, want %q", err, notFound)
			}
			n.crictl(t, "pull", reg.host+"/pause:1") // for the default handler
			plain := n.pod(t, "plain-again", "")
			t.Run("overlayfs first", func(t *testing.T) {
				n.crictl(t, "pull", first.ref)
				n.runs(t, lazy, "lazy-first", first)
				n.runs(t, plain, "plain-first", first)
				// CRI tells what image it is also when it unpacks for a
				// container, unless disable_snapshot_annotations forbids it.
				if used := n.usage(t, n.proxyOf("tatami").Root); (used < largeSize) == w.transfer {
					t.Errorf("%d bytes are unpacked for a file of %d", used, largeSize)
				}
			})
			t.Run("lazy first", func(t *testing.T) {
				n.pullFor(t, second.ref, "lazy")
				n.runs(t, lazy, "lazy-second", second)
				n.checkLazy(t, reg, second)
				// Nobody has fetched the layers for another snapshotter, and
				// creating a container does not.
				_, err := n.tryCreate(t, plain, container{name: "too-early", image: second.ref})
				if err == nil || !strings.Contains(err.Error(), notFound) {
					t.Errorf("overlayfs without the layers: %v, want %q", err, notFound)
				}
				n.crictl(t, "pull", second.ref) // for the default handler
				n.runs(t, plain, "plain-second", second)
			})
			n.removePod(t, plain)
			n.removePod(t, lazy)
			for _, app := range []image{first, second} {
				n.crictl(t, "rmi", app.ref)
			}
			for _, snapshotter := range []string{"overlayfs", "tatami"} {
				until(t, func() error { return n.onlyPause(t, snapshotter) })
			}
		})
	}
}

// runs creates a container that must read its image.
func (n *node) runs(t *testing.T, pod, name string, app image) {
	t.Helper()
	id := n.create(t, pod, container{name: name, image: app.ref})
	if got := n.exec(t, id, "cat", "/data/greeting"); got != greeting {
		t.Errorf("%s reads %q, want %q", name, got, greeting)
	}
}
