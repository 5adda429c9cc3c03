package class

import (
	"maps"
	"strings"
)

// QoS classes of Kubernetes (core/v1, PodQOSClass).
const (
	Guaranteed = "Guaranteed"
	Burstable  = "Burstable"
	BestEffort = "BestEffort"
)

// Facts are what the node knows of a container's pod. What is empty is not known.
type Facts struct {
	Labels, Annotations map[string]string
	Namespace           string
	Runtime             string // handler
	Snapshotter         string // of the container's image
	QoS                 string // one of the above
	// Incomplete says that who knows labels and runtime handler did not answer.
	Incomplete bool
}

// With returns what either knows; f counts where both do.
func (f Facts) With(other Facts) Facts {
	for _, s := range []struct{ to, from *string }{
		{&f.Namespace, &other.Namespace}, {&f.Runtime, &other.Runtime}, {&f.Snapshotter, &other.Snapshotter}, {&f.QoS, &other.QoS},
	} {
		if *s.to == "" {
			*s.to = *s.from
		}
	}
	f.Labels, f.Annotations = merge(f.Labels, other.Labels), merge(f.Annotations, other.Annotations)
	f.Incomplete = f.Incomplete || other.Incomplete
	return f
}

func merge(a, b map[string]string) map[string]string {
	out := make(map[string]string, len(a)+len(b))
	maps.Copy(out, b)
	maps.Copy(out, a)
	return out
}

// QoSOf reads the QoS class of a pod out of the path of its cgroup, or a
// container's; "" when the kubelet has not made it. With the cgroupfs driver that is
// /kubepods/besteffort/pod<uid>, with systemd's kubepods-besteffort-pod<uid>.slice,
// alone or below others, with ":<prefix>:<name>" behind it in a runtime
// configuration. Guaranteed pods are not below a level of their own.
// (kubernetes pkg/kubelet/cm/cgroup_manager_linux.go, qos_container_manager_linux.go;
// containerd internal/cri/server/podsandbox/helpers.go, getCgroupsPath.)
func QoSOf(cgroup string) string {
	path, _, _ := strings.Cut(cgroup, ":")
	words := strings.FieldsFunc(path, func(r rune) bool { return r == '/' || r == '-' || r == '.' })
	for i, w := range words[:max(0, len(words)-1)] {
		if w != "kubepods" {
			continue
		}
		switch next := words[i+1]; {
		case next == "besteffort":
			return BestEffort
		case next == "burstable":
			return Burstable
		case strings.HasPrefix(next, "pod"):
			return Guaranteed
		}
	}
	return ""
}
