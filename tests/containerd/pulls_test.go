package containerd

import (
	"errors"
	"fmt"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// TestConcurrentPulls pulls images that share a layer, each several times, all at
// once, and runs them.
func TestConcurrentPulls(t *testing.T) {
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			reg := startRegistry(t)
			n, _, _ := shareNode(t, w, reg)
			var apps []image
			for i := range 4 {
				apps = append(apps, reg.pushApp(t, fmt.Sprintf("app%d", i), uint64(i)))
			}
			var pulls errgroup.Group
			for range 3 {
				for _, app := range apps {
					pulls.Go(func() error {
						_, err := n.try(t, n.crictlArgs("pull", app.ref)...)
						return err
					})
				}
			}
			if err := pulls.Wait(); err != nil {
				t.Fatal(err)
			}
			pod := n.pod(t, "many", "")
			for i, app := range apps {
				id := n.create(t, pod, container{name: app.repo, image: app.ref})
				if got, want := n.exec(t, id, "sha256sum", "/data/large"), largeSum(uint64(i)); got != want {
					t.Errorf("%s: large file: %s, want %s", app.repo, got, want)
				}
				if n.hasContent(t, "k8s.io", app.layers[1]) {
					t.Errorf("%s: containerd has fetched the upper layer", app.repo)
				}
			}
			n.removePod(t, pod)
		})
	}
}

// TestFallback runs an image that containerd unpacks and that cannot be served
// lazily: a name in its layer leads out of it.
func TestFallback(t *testing.T) {
	for _, w := range ways {
		t.Run(w.name, func(t *testing.T) {
			reg := startRegistry(t)
			odd := reg.pushImage(t, "odd", ocispec.ImageConfig{Cmd: []string{"/bin/sleep", "1000000"}, Env: []string{"PATH=/bin"}},
				gzipped(t, tools(t)...), gzipped(t, registrytest.Dir("data", 0o755),
					registrytest.File("data/greeting", 0o644, greeting+"\n"), registrytest.File("../outside", 0o644, "x")))
			n, _, _ := shareNode(t, w, reg)
			n.criLife(t, odd, "")
			n.crictl(t, "pull", odd.ref)
			if !n.hasContent(t, "k8s.io", odd.layers[1]) {
				t.Error("containerd has not fetched a layer that it had to unpack")
			}
			for where, text := range map[string]string{"log": n.hostLog(t), "status": n.status(t)} {
				if err := saysWhy(text, "outside"); err != nil {
					t.Errorf("%s: %v", where, err)
				}
			}
		})
	}
}

// saysWhy looks for a line about an image's fallback that names the reason.
func saysWhy(text, reason string) error {
	for line := range strings.Lines(text) {
		if strings.Contains(line, "full") && strings.Contains(line, reason) {
			return nil
		}
	}
	return errors.New("it does not say why the image is unpacked")
}
