package kata

import (
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/host/class"
)

// Bounds of what is read of containerd's state.
const (
	maxSpec       = 16 << 20 // bytes; containerd's messages have at most that
	maxNamespaces = 256
)

// Annotations of a container's bundle, of the CRI plugin of containerd
// (internal/cri/annotations/annotations.go) and of CRI-O. Kata goes by the same
// (libs/kata-types/src/annotations/{cri_containerd,crio}.rs;
// runtime-rs/crates/resource/src/rootfs/virtual_volume.rs).
const (
	sandboxID     = "io.kubernetes.cri.sandbox-id"
	containerType = "io.kubernetes.cri.container-type"
	imageName     = "io.kubernetes.cri.image-name"
	podNamespace  = "io.kubernetes.cri.sandbox-namespace"

	crioSandboxID     = "io.kubernetes.cri-o.SandboxID"
	crioContainerType = "io.kubernetes.cri-o.ContainerType"
	crioImageName     = "io.kubernetes.cri-o.ImageName"
	crioNamespace     = "io.kubernetes.cri-o.Namespace"
)

// Container is what containerd knows of one.
type Container struct {
	ID        string
	Namespace string // of containerd
	Sandbox   string
	Type      string // "sandbox" or "container"; "" without CRI
	Image     string // as the pod names it; may be ""
	// Pod is what its configuration says of the pod; Annotations are those that
	// containerd's configuration passes on, and containerd's own.
	Pod *class.Facts

	stamp stamp  // of its config.json
	args  string // see Args
}

// Args are the words of the container's command.
func (c Container) Args() []string {
	if c.args == "" {
		return nil
	}
	return strings.Split(c.args, "\x00")
}

// Bundles are the containers that containerd runs.
type Bundles struct{ dir string }

// NewBundles reads in containerd's state directory, "/run/containerd" unless
// its configuration says otherwise.
func NewBundles(state string) *Bundles {
	return &Bundles{filepath.Join(state, "io.containerd.runtime.v2.task")}
}

// Owned returns the container id of a sandbox. That there is none, or that it
// belongs to another sandbox, are both ErrNotFound; the text says which.
func (b *Bundles) Owned(sandbox, id string) (Container, error) {
	return b.find(id, func(c Container) error {
		if c.Sandbox != sandbox {
			return fmt.Errorf("it belongs to sandbox %.64q in namespace %s", c.Sandbox, c.Namespace)
		}
		return nil
	})
}

// Any returns the container id of whatever sandbox; ErrNotFound when there is none.
func (b *Bundles) Any(id string) (Container, error) {
	return b.find(id, func(Container) error { return nil })
}

// find returns the first container id that fits.
func (b *Bundles) find(id string, fits func(Container) error) (Container, error) {
	if !ValidID(id) {
		return Container{}, fmt.Errorf("container %.64q is no plain name: %w", id, errdefs.ErrNotFound)
	}
	root, namespaces, err := b.open()
	if err != nil {
		return Container{}, fmt.Errorf("look for container %s: %w", id, err)
	}
	defer root.Close()
	errs := []error{}
	for _, ns := range namespaces {
		c, err := read(root, ns, id)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = fits(c)
		}
		if err == nil {
			return c, nil
		}
		errs = append(errs, err)
	}
	if len(errs) == 0 {
		errs = append(errs, fmt.Errorf("containerd has no bundle of it in %s", b.dir))
	}
	return Container{}, fmt.Errorf("container %s: %w: %w", id, errdefs.ErrNotFound, errors.Join(errs...))
}

// Gone says whether a container that was found is gone or was made anew.
func (b *Bundles) Gone(c Container) bool {
	root, err := os.OpenRoot(b.dir)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	defer root.Close()
	f, err := openSpec(root, c.Namespace, c.ID)
	if err != nil {
		return errors.Is(err, fs.ErrNotExist)
	}
	defer f.Close()
	now, ok := stampOf(int(f.Fd()), "", unix.S_IFREG)
	return !ok || now != c.stamp
}

// open opens the directory of all bundles and lists the namespaces.
func (b *Bundles) open() (*os.Root, []string, error) {
	root, err := os.OpenRoot(b.dir)
	if errors.Is(err, fs.ErrNotExist) {
		err = fmt.Errorf("%w: %w", errdefs.ErrNotFound, err)
	}
	if err != nil {
		return nil, nil, err
	}
	dir, err := root.Open(".")
	if err != nil {
		return nil, nil, errors.Join(err, root.Close())
	}
	defer dir.Close()
	entries, err := dir.ReadDir(maxNamespaces)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, nil, errors.Join(err, root.Close())
	}
	var names []string
	for _, e := range entries {
		if e.IsDir() && ValidID(e.Name()) {
			names = append(names, e.Name())
		}
	}
	return root, names, nil
}

// openSpec opens a bundle's config.json, which must be a plain file. os.Root
// follows no symbolic link out of the directory.
func openSpec(root *os.Root, namespace, id string) (*os.File, error) {
	// Nonblocking, for a pipe of that name.
	return root.OpenFile(filepath.Join(namespace, id, "config.json"), os.O_RDONLY|unix.O_NONBLOCK, 0)
}

func read(root *os.Root, namespace, id string) (Container, error) {
	f, err := openSpec(root, namespace, id)
	if err != nil {
		return Container{}, err
	}
	defer f.Close()
	c := Container{ID: id, Namespace: namespace}
	var ok bool
	if c.stamp, ok = stampOf(int(f.Fd()), "", unix.S_IFREG); !ok {
		return Container{}, fmt.Errorf("bundle of %s in namespace %s: config.json is no plain file", id, namespace)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxSpec+1))
	if err == nil && len(data) > maxSpec {
		err = fmt.Errorf("longer than %d bytes", maxSpec)
	}
	if err == nil {
		err = c.decode(data)
	}
	if err != nil {
		return Container{}, fmt.Errorf("bundle of %s in namespace %s: read config.json: %w", id, namespace, err)
	}
	return c, nil
}

// decode reads annotations and cgroup of an OCI runtime configuration. A container
// without those of a CRI is its own sandbox, as `ctr run` and nerdctl make it.
func (c *Container) decode(spec []byte) error {
	var in struct {
		Annotations map[string]string `json:"annotations"`
		Process     struct {
			Args []string `json:"args"`
		} `json:"process"`
		Linux struct {
			CgroupsPath string `json:"cgroupsPath"`
		} `json:"linux"`
	}
	if err := json.Unmarshal(spec, &in); err != nil {
		return err
	}
	get := func(cri, crio string) string { return cmp.Or(in.Annotations[cri], in.Annotations[crio]) }
	c.Sandbox = cmp.Or(get(sandboxID, crioSandboxID), c.ID)
	c.Type = get(containerType, crioContainerType)
	c.Image = get(imageName, crioImageName)
	c.args = strings.Join(in.Process.Args, "\x00") // which no word can have
	c.Pod = &class.Facts{
		Annotations: in.Annotations, Namespace: get(podNamespace, crioNamespace), QoS: class.QoSOf(in.Linux.CgroupsPath),
	}
	return nil
}
