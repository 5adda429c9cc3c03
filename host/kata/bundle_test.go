package kata

import (
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/host/class"
)

// containerd is its state directory.
type containerd struct {
	*Bundles
	t   *testing.T
	dir string
}

func newState(t *testing.T) *containerd {
	dir := t.TempDir()
	return &containerd{NewBundles(dir), t, dir}
}

// bundle makes the bundle of a container as containerd does
// (core/runtime/v2/bundle.go) and returns its config.json.
func (s *containerd) bundle(namespace, id string, annotations map[string]string) string {
	s.t.Helper()
	spec, err := json.Marshal(specs.Spec{
		Version: specs.Version, Process: &specs.Process{Args: []string{"sh"}}, Root: &specs.Root{Path: "rootfs"},
		Annotations: annotations,
	})
	if err != nil {
		s.t.Fatal(err)
	}
	return s.write(namespace, id, spec)
}

func (s *containerd) write(namespace, id string, spec []byte) string {
	s.t.Helper()
	dir := s.path(namespace, id)
	err := errors.Join(os.MkdirAll(filepath.Join(dir, "rootfs"), 0o700), os.Symlink("/var/lib/x/"+id, filepath.Join(dir, "work")))
	file := filepath.Join(dir, "config.json")
	if err = errors.Join(err, os.WriteFile(file, spec, 0o600)); err != nil {
		s.t.Fatal(err)
	}
	return file
}

func (s *containerd) path(elem ...string) string {
	return filepath.Join(append([]string{s.dir, "io.containerd.runtime.v2.task"}, elem...)...)
}

// cri is what containerd's CRI plugin says of a container.
func cri(sandbox, image string) map[string]string {
	return map[string]string{
		"io.kubernetes.cri.container-type": "container", "io.kubernetes.cri.sandbox-id": sandbox,
		"io.kubernetes.cri.image-name": image, "io.kubernetes.cri.sandbox-name": "web",
	}
}

func TestOwned(t *testing.T) {
	s := newState(t)
	s.bundle("k8s.io", "pod", map[string]string{"io.kubernetes.cri.container-type": "sandbox", "io.kubernetes.cri.sandbox-id": "pod"})
	s.bundle("k8s.io", "c1", cri("pod", "docker.io/library/app:v1"))
	s.bundle("k8s.io", "web", cri("pod", "docker.io/library/web:v1"))
	s.bundle("default", "web", nil) // ctr run web
	s.bundle("k8s.io", "crio", map[string]string{
		"io.kubernetes.cri-o.ContainerType": "container", "io.kubernetes.cri-o.SandboxID": "pod",
		"io.kubernetes.cri-o.ImageName": "quay.io/app:v2",
	})
	for _, tc := range []struct {
		sandbox, id string
		want        Container
	}{
		{"pod", "pod", Container{ID: "pod", Namespace: "k8s.io", Sandbox: "pod", Type: "sandbox"}},
		{"pod", "c1", Container{ID: "c1", Namespace: "k8s.io", Sandbox: "pod", Type: "container", Image: "docker.io/library/app:v1"}},
		{"pod", "crio", Container{ID: "crio", Namespace: "k8s.io", Sandbox: "pod", Type: "container", Image: "quay.io/app:v2"}},
		{"pod", "web", Container{ID: "web", Namespace: "k8s.io", Sandbox: "pod", Type: "container", Image: "docker.io/library/web:v1"}},
		{"web", "web", Container{ID: "web", Namespace: "default", Sandbox: "web"}},
	} {
		got, err := s.Owned(tc.sandbox, tc.id)
		if words := got.Args(); err == nil && !slices.Equal(words, []string{"sh"}) {
			t.Errorf("%s of %s: its command is %q", tc.id, tc.sandbox, words)
		}
		got.Pod = nil // TestPod
		if got.stamp, got.args = (stamp{}), ""; err != nil || got != tc.want {
			t.Errorf("%s of %s: %+v, %v, want %+v", tc.id, tc.sandbox, got, err, tc.want)
		}
	}
	if c, err := s.Any("c1"); err != nil || c.Sandbox != "pod" {
		t.Errorf("c1 of any sandbox: %+v, %v", c, err)
	}
	if _, err := s.Any("absent"); !errdefs.IsNotFound(err) {
		t.Errorf("none of any sandbox: %v", err)
	}
	for id, sandbox := range map[string]string{
		"c1": "other", "web": "other", "absent": "pod", "..": "pod", "": "pod", "k8s.io/c1": "pod", "../k8s.io/c1": "pod",
		"c1\x00": "pod", strings.Repeat("x", 5000): "pod",
	} {
		if c, err := s.Owned(sandbox, id); !errdefs.IsNotFound(err) || c != (Container{}) {
			t.Errorf("%.20q of %s: %+v, %v", id, sandbox, c, err)
		}
	}
	if _, err := NewBundles("/absent").Owned("pod", "c1"); !errdefs.IsNotFound(err) {
		t.Errorf("no containerd: %v", err)
	}
}

// TestPod reads what a bundle says of its pod.
func TestPod(t *testing.T) {
	for cgroup, qos := range map[string]string{
		"kubepods-besteffort-pod1.slice:cri-containerd:c1": class.BestEffort, "/kubepods/pod1/c1": class.Guaranteed, "/k8s.io/c1": "",
	} {
		annotations := cri("pod", "app:v1")
		annotations["io.kubernetes.cri.sandbox-namespace"], annotations["team/tier"] = "jobs", "web"
		spec, err := json.Marshal(specs.Spec{Annotations: annotations, Linux: &specs.Linux{CgroupsPath: cgroup}})
		if err != nil {
			t.Fatal(err)
		}
		s := newState(t)
		s.write("k8s.io", "c1", spec)
		c, err := s.Owned("pod", "c1")
		if err != nil || c.Pod.QoS != qos || c.Pod.Namespace != "jobs" || c.Pod.Annotations["team/tier"] != "web" {
			t.Errorf("%s: %+v, %v", cgroup, c.Pod, err)
		}
	}
}

// What containerd did not write is refused, within bounds.
func TestHostileBundles(t *testing.T) {
	s := newState(t)
	outside := filepath.Join(t.TempDir(), "config.json")
	good := s.bundle("k8s.io", "good", cri("pod", "app:v1"))
	data, err := os.ReadFile(good)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(outside, data, 0o600); err != nil {
		t.Fatal(err)
	}
	replace := func(id string, with func(path string) error) {
		file := s.bundle("k8s.io", id, nil)
		if err := errors.Join(os.Remove(file), with(file)); err != nil {
			t.Fatal(err)
		}
	}
	replace("link", func(p string) error { return os.Symlink(outside, p) })
	replace("relative", func(p string) error { return os.Symlink("../../../../../../../../.."+outside, p) })
	replace("pipe", func(p string) error { return unix.Mkfifo(p, 0o600) })
	replace("dir", func(p string) error { return os.Mkdir(p, 0o700) })
	if err := os.Symlink(filepath.Dir(outside), s.path("k8s.io", "bundle")); err != nil {
		t.Fatal(err)
	}
	s.write("k8s.io", "malformed", []byte(`{"annotations": {`))
	s.write("k8s.io", "type", []byte(`{"annotations": {"io.kubernetes.cri.sandbox-id": ["pod"]}}`))
	s.write("k8s.io", "list", []byte(`[]`))
	s.write("k8s.io", "nothing", nil)
	huge := s.write("k8s.io", "huge", nil)
	if err := os.Truncate(huge, 1<<40); err != nil { // sparse
		t.Fatal(err)
	}
	for _, id := range []string{"link", "relative", "pipe", "dir", "bundle", "malformed", "type", "list", "nothing", "huge"} {
		if c, err := s.Owned("pod", id); !errdefs.IsNotFound(err) || c != (Container{}) {
			t.Errorf("%s: %+v, %v", id, c, err)
		}
	}
	if _, err := s.Owned("pod", "good"); err != nil {
		t.Error(err)
	}
}

// A container is gone with its bundle; one that another sandbox has made under
// the same id is another's.
func TestContainerMoves(t *testing.T) {
	s := newState(t)
	s.bundle("k8s.io", "c1", cri("pod", "app:v1"))
	c, err := s.Owned("pod", "c1")
	if err != nil || s.Gone(c) {
		t.Fatalf("%+v, %v, gone %v", c, err, s.Gone(c))
	}
	if err := os.RemoveAll(s.path("k8s.io", "c1")); err != nil {
		t.Fatal(err)
	}
	if !s.Gone(c) {
		t.Error("it is not gone with its bundle")
	}
	s.bundle("k8s.io", "c1", cri("other", "app:v1"))
	if !s.Gone(c) {
		t.Error("it is not gone when there is another")
	}
	if _, err := s.Owned("pod", "c1"); !errdefs.IsNotFound(err) {
		t.Errorf("the first sandbox: %v", err)
	}
	if _, err := s.Owned("other", "c1"); err != nil {
		t.Errorf("the other: %v", err)
	}
	if err := os.RemoveAll(s.path()); err != nil {
		t.Fatal(err)
	}
	if !s.Gone(c) {
		t.Error("it is not gone with all bundles")
	}
}

func FuzzDecode(f *testing.F) {
	for _, spec := range []string{
		"", "{}", "null", `{"annotations": null}`, `{"annotations": {"io.kubernetes.cri.sandbox-id": "pod", "io.kubernetes.cri.image-name": "app:v1"}}`,
		`{"annotations": {"io.kubernetes.cri-o.SandboxID": "pod"}}`, `{"annotations": {"a": 1}}`, `{"annotations": {}, "annotations": {"a": "b"}}`,
	} {
		f.Add([]byte(spec))
	}
	f.Fuzz(func(t *testing.T, spec []byte) {
		c := Container{ID: "c1"}
		if err := c.decode(spec); err == nil && c.Sandbox == "" {
			t.Error("a container without a sandbox")
		}
	})
}
