package containerd

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// testPulls pulls images that share a layer, each several times, all at once, and
// runs them.
func (r *rig) testPulls(t *testing.T) {
	var apps []image
	for i := range uint64(4) {
		apps = append(apps, r.reg.pushApp(t, fmt.Sprintf("many%d", i), 1+i))
	}
	var pulls errgroup.Group
	for range 3 {
		for _, app := range apps {
			pulls.Go(func() error {
				_, err := r.try(t, r.crictlArgs("pull", app.ref)...)
				return err
			})
		}
	}
	if err := pulls.Wait(); err != nil {
		t.Fatal(err)
	}
	pod := r.pod(t, "many", "")
	for i, app := range apps {
		id := r.create(t, pod, container{name: app.repo, image: app.ref})
		if r.hasContent(t, "k8s.io", app.layers[1]) {
			t.Errorf("%s: containerd has fetched the upper layer", app.repo)
		}
		if got, want := r.exec(t, id, "sha256sum", "/data/large"), largeSum(1+uint64(i)); got != want {
			t.Errorf("%s: large file: %s, want %s", app.repo, got, want)
		}
	}
	r.removePod(t, pod)
	for _, app := range apps {
		r.crictl(t, "rmi", app.ref)
	}
}

// testRemoval removes an image that has two names, and shares a layer with
// another one, which stays.
func (r *rig) testRemoval(t *testing.T) {
	one, again, other := r.reg.pushApp(t, "one", 4), r.reg.pushApp(t, "again", 4), r.reg.pushApp(t, "other", 5)
	for _, app := range []image{one, again, other} {
		r.crictl(t, "pull", app.ref)
	}
	r.crictl(t, "rmi", one.ref) // with all its names
	left := r.images(t)
	for app, want := range map[string]bool{one.ref: false, again.ref: false, other.ref: true} {
		if slices.Contains(left, app) != want {
			t.Errorf("images after the removal of %s: %s", one.ref, strings.Join(left, " "))
		}
	}
	pod := r.pod(t, "other", "")
	id := r.create(t, pod, container{name: "other", image: other.ref})
	if got, want := r.exec(t, id, "sha256sum", "/data/large"), largeSum(5); got != want {
		t.Errorf("large file: %s, want %s", got, want)
	}
	r.removePod(t, pod)
	r.crictl(t, "rmi", other.ref)
}

// testFallback runs an image that containerd unpacks and that cannot be served
// lazily: a name in its layer leads out of it.
func (r *rig) testFallback(t *testing.T) {
	odd := r.reg.pushImage(t, "odd", ocispec.ImageConfig{Cmd: []string{"/bin/sleep", "1000000"}, Env: []string{"PATH=/bin"}},
		gzipped(t, tools(t)...), gzipped(t, registrytest.Dir("data", 0o755),
			registrytest.File("data/greeting", 0o644, greeting+"\n"), registrytest.File("../outside", 0o644, "x")))
	r.criLife(t, odd, "")
	r.crictl(t, "pull", odd.ref)
	defer r.crictl(t, "rmi", odd.ref)
	if !r.hasContent(t, "k8s.io", odd.layers[1]) {
		t.Error("containerd has not fetched a layer that it had to unpack")
	}
	for where, text := range map[string]string{"log": r.hostLog(t), "status": r.status(t)} {
		if err := saysWhy(text, "outside"); err != nil {
			t.Errorf("%s: %v", where, err)
		}
	}
}

// testRegistryFails pulls an image while its registry fails for the node: the pull
// fails and says why, and the next one has the image lazily.
func (r *rig) testRegistryFails(t *testing.T) {
	app := r.reg.pushApp(t, "fails", 6)
	r.reg.failing.Store(true)
	out, err := r.try(t, r.crictlArgs("pull", app.ref)...)
	r.reg.failing.Store(false)
	if err == nil || !strings.Contains(out+err.Error(), "HTTP status 503") || !strings.Contains(out+err.Error(), "this may pass, pull again") {
		t.Errorf("pull while the registry fails: %v %s", err, out)
	}
	r.crictl(t, "pull", app.ref)
	defer r.crictl(t, "rmi", app.ref)
	if r.hasContent(t, "k8s.io", app.layers[1]) {
		t.Error("containerd has fetched the upper layer")
	}
}

// saysWhy looks for a line about an image's fallback that names the reason.
func saysWhy(text, reason string) error {
	for line := range strings.Lines(text) {
		if strings.Contains(line, "odd") && strings.Contains(line, reason) {
			return nil
		}
	}
	return errors.New("it does not say why the image is unpacked")
}
