package containerd

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// crictl runs crictl.
func (n *node) crictl(t *testing.T, args ...string) string {
	t.Helper()
	return strings.TrimSpace(n.run(t, n.crictlArgs(args...)...))
}

func (n *node) crictlArgs(args ...string) []string {
	return append([]string{n.rel.crictl, "--runtime-endpoint", "unix:///run/containerd/containerd.sock",
		"--timeout", patience.String()}, args...)
}

// pod starts a sandbox on the machine's network and returns its id. handler may
// be "".
func (n *node) pod(t *testing.T, name, handler string) string {
	t.Helper()
	args := []string{"runp"}
	if handler != "" {
		args = append(args, "--runtime", handler)
	}
	return n.crictl(t, append(args, n.podConfig(t, name, handler))...)
}

// pullFor pulls an image for the pods of a handler, as kubelet does.
func (n *node) pullFor(t *testing.T, ref, handler string) {
	t.Helper()
	n.crictl(t, "pull", "--pod-config", n.podConfig(t, "pull", handler), ref)
}

// hostNetwork is NamespaceMode NODE of CRI's API.
const hostNetwork = 2

// podConfig writes a PodSandboxConfig and returns its path. crictl has no flag for
// the handler of a pull; containerd takes it from an annotation as well
// (internal/cri/server/images/image_pull.go, snapshotterFromPodSandboxConfig).
func (n *node) podConfig(t *testing.T, name, handler string) string {
	t.Helper()
	return n.writeJSON(t, "pod-"+name, map[string]any{
		"annotations":   map[string]string{"io.containerd.cri.runtime-handler": handler},
		"metadata":      map[string]any{"name": name, "uid": name, "namespace": "tests"},
		"log_directory": n.dir,
		"linux": map[string]any{
			"cgroup_parent":    "/" + n.cgroup,
			"security_context": map[string]any{"namespace_options": map[string]any{"network": hostNetwork}},
		},
	})
}

// container is what a test asks of a container under CRI.
type container struct {
	name, image string
	command     []string
	user        string // run_as_username
}

// create creates a container in a pod and starts it; it returns its id. The
// image is there already.
func (n *node) create(t *testing.T, pod string, c container) string {
	t.Helper()
	id, err := n.tryCreate(t, pod, c)
	if err != nil {
		t.Fatal(err)
	}
	n.crictl(t, "start", id)
	return id
}

// tryCreate only creates the container.
func (n *node) tryCreate(t *testing.T, pod string, c container) (id string, err error) {
	t.Helper()
	config := map[string]any{
		"metadata": map[string]any{"name": c.name},
		"image":    map[string]any{"image": c.image},
		"command":  c.command,
		"log_path": c.name + ".out",
		"linux":    map[string]any{"security_context": map[string]any{"run_as_username": c.user}},
	}
	id, err = n.try(t, n.crictlArgs("create", "--no-pull", pod, n.writeJSON(t, "container-"+c.name, config), n.podConfig(t, c.name, ""))...)
	return strings.TrimSpace(id), err
}

// exec runs a command in a container of CRI and returns the line that it writes;
// crictl adds empty ones.
func (n *node) exec(t *testing.T, id string, command ...string) string {
	t.Helper()
	return n.crictl(t, append([]string{"exec", "--sync", id}, command...)...)
}

func (n *node) writeJSON(t *testing.T, name string, v any) string {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(n.dir, name+".json")
	if err := os.WriteFile(path, b, 0o644); err != nil {
		t.Fatal(err)
	}
	return path
}

// removePod stops and removes a sandbox with its containers.
func (n *node) removePod(t *testing.T, id string) {
	t.Helper()
	n.crictl(t, "stopp", id)
	n.crictl(t, "rmp", id)
}

// images lists the references that CRI knows.
func (n *node) images(t *testing.T) []string {
	t.Helper()
	var list struct {
		Images []struct{ RepoTags []string }
	}
	if err := json.Unmarshal([]byte(n.crictl(t, "images", "--output", "json")), &list); err != nil {
		t.Fatal(fmt.Errorf("crictl images: %w", err))
	}
	var tags []string
	for _, i := range list.Images {
		tags = append(tags, i.RepoTags...)
	}
	return tags
}
