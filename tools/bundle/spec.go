// Package bundle turns an image configuration into the OCI runtime
// configuration of a container.
package bundle

import (
	"fmt"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/opencontainers/runtime-spec/specs-go"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// specVersion is the oldest version of the specification that has all that Spec
// uses; crun 1.8 refuses versions that it does not know.
const specVersion = "1.0.2"

const defaultPath = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// capabilities are what containerd and Docker leave to a container by default
// (containerd: pkg/oci/spec.go).
var capabilities = []string{
	"CAP_AUDIT_WRITE", "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER",
	"CAP_FSETID", "CAP_KILL", "CAP_MKNOD", "CAP_NET_BIND_SERVICE",
	"CAP_NET_RAW", "CAP_SETFCAP", "CAP_SETGID", "CAP_SETPCAP", "CAP_SETUID",
	"CAP_SYS_CHROOT",
}

// Spec makes the configuration of a container of the image img. The command is
// the image's entrypoint and args, or its default arguments when args is
// empty. An image without either is ErrInvalidArgument.
func Spec(img ocispec.ImageConfig, args []string, hostname string) (*specs.Spec, error) {
	argv := command(img, args)
	if len(argv) == 0 {
		return nil, fmt.Errorf("the image has neither entrypoint nor command; name one behind --: %w", errdefs.ErrInvalidArgument)
	}
	s := &specs.Spec{
		Version:  specVersion,
		Hostname: hostname,
		Root:     &specs.Root{Path: "rootfs"},
		Process: &specs.Process{
			Args:         argv,
			Env:          environment(img.Env),
			Cwd:          workingDir(img.WorkingDir),
			Capabilities: &specs.LinuxCapabilities{Bounding: capabilities, Effective: capabilities, Permitted: capabilities},
		},
		Mounts: mounts(),
		Linux:  linux(),
	}
	setUser(s, img.User)
	return s, nil
}

func command(img ocispec.ImageConfig, args []string) []string {
	if len(args) == 0 {
		args = img.Cmd
	}
	return slices.Concat(img.Entrypoint, args)
}

func environment(env []string) []string {
	if slices.ContainsFunc(env, func(e string) bool { return strings.HasPrefix(e, "PATH=") }) {
		return env
	}
	return append([]string{defaultPath}, env...)
}

func workingDir(dir string) string {
	if !strings.HasPrefix(dir, "/") {
		return "/" + dir
	}
	return dir
}

// setUser takes a numeric "uid" or "uid:gid" as it is and leaves names to the
// maker of the bundle.
func setUser(s *specs.Spec, user string) {
	if user == "" {
		return
	}
	name, group, hasGroup := strings.Cut(user, ":")
	uid, errU := strconv.ParseUint(name, 10, 32)
	gid, errG := strconv.ParseUint(group, 10, 32)
	if errU == nil && hasGroup && errG == nil {
		s.Process.User = specs.User{UID: uint32(uid), GID: uint32(gid)}
		return
	}
	s.Annotations = map[string]string{api.UserAnnotation: user}
}

func mounts() []specs.Mount {
	return []specs.Mount{
		{Destination: "/proc", Type: "proc", Source: "proc", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/dev", Type: "tmpfs", Source: "tmpfs", Options: []string{"nosuid", "strictatime", "mode=755", "size=65536k"}},
		{Destination: "/dev/pts", Type: "devpts", Source: "devpts", Options: []string{"nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"}},
		{Destination: "/dev/shm", Type: "tmpfs", Source: "shm", Options: []string{"nosuid", "noexec", "nodev", "mode=1777", "size=65536k"}},
		{Destination: "/dev/mqueue", Type: "mqueue", Source: "mqueue", Options: []string{"nosuid", "noexec", "nodev"}},
		{Destination: "/sys", Type: "sysfs", Source: "sysfs", Options: []string{"nosuid", "noexec", "nodev", "ro"}},
	}
}

// linux gives the container namespaces of its own, but for the network, which
// it shares with its sandbox.
func linux() *specs.Linux {
	return &specs.Linux{
		Namespaces: []specs.LinuxNamespace{
			{Type: specs.PIDNamespace}, {Type: specs.IPCNamespace},
			{Type: specs.UTSNamespace}, {Type: specs.MountNamespace},
		},
		Resources: &specs.LinuxResources{Devices: []specs.LinuxDeviceCgroup{{Allow: false, Access: "rwm"}}},
		MaskedPaths: []string{"/proc/acpi", "/proc/asound", "/proc/kcore", "/proc/keys", "/proc/latency_stats",
			"/proc/timer_list", "/proc/timer_stats", "/proc/sched_debug", "/sys/firmware", "/proc/scsi"},
		ReadonlyPaths: []string{"/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"},
	}
}
