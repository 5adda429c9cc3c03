package containerd

import (
	"bytes"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"text/template"
)

// setup is how a containerd is configured.
type setup struct {
	Node        string // its directory
	Pause       string // image of the sandbox
	Snapshotter string // of CRI, for handlers that do not say
	Proxies     []proxy
	Handlers    []handler // beside "runc"
	Lines       string    // more for the images of CRI
	Transfer    bool      // containerd 2: CRI pulls by the transfer service
	Platform    string    // of the machine
}

// proxy is a proxy plugin.
type proxy struct{ Name, Socket, Root string }

// handler is a runtime handler of CRI that runs runc with a snapshotter of its
// own.
type handler struct{ Name, Snapshotter string }

// configs are by containerd's major version. What is not needed here and not
// there on every kernel is off; there is no CNI plugin: pods use the network of
// the machine. The score by which the kernel kills out of memory is not lowered:
// machines for tests may lack CAP_SYS_RESOURCE.
var configs = map[int]*template.Template{
	2: template.Must(template.New("").Parse(`
version = 3
root = "{{.Node}}/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.nri.v1.nri", "io.containerd.snapshotter.v1.blockfile",
  "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper",
  "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt"]
[grpc]
address = "/run/containerd/containerd.sock"
[plugins."io.containerd.cri.v1.images"]
snapshotter = "{{.Snapshotter}}"
disable_snapshot_annotations = {{.Transfer}}
stats_collect_period = 1
{{.Lines}}
[plugins."io.containerd.cri.v1.images".pinned_images]
sandbox = "{{.Pause}}"
[plugins."io.containerd.cri.v1.runtime"]
restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
{{range .Handlers}}
[plugins."io.containerd.cri.v1.images".runtime_platforms.{{.Name}}]
snapshotter = "{{.Snapshotter}}"
[plugins."io.containerd.cri.v1.runtime".containerd.runtimes.{{.Name}}]
runtime_type = "io.containerd.runc.v2"
snapshotter = "{{.Snapshotter}}"
{{end}}
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "{{.Platform}}"
snapshotter = "overlayfs"
differ = "walking"
{{range .Proxies}}
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
platform = "{{$.Platform}}"
snapshotter = "{{.Name}}"
differ = "walking"
[proxy_plugins.{{.Name}}]
type = "snapshot"
address = "{{.Socket}}"
[proxy_plugins.{{.Name}}.exports]
root = "{{.Root}}"
enable_remote_snapshot_annotations = "true"
{{end}}`)),
	1: template.Must(template.New("").Parse(`
version = 2
root = "{{.Node}}/containerd"
state = "/run/containerd"
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs",
  "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs", "io.containerd.internal.v1.opt"]
[grpc]
address = "/run/containerd/containerd.sock"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{{.Pause}}"
stats_collect_period = 1
restrict_oom_score_adj = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "{{.Snapshotter}}"
disable_snapshot_annotations = false
{{.Lines}}
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
runtime_type = "io.containerd.runc.v2"
{{range .Proxies}}
[proxy_plugins.{{.Name}}]
type = "snapshot"
address = "{{.Socket}}"
{{end}}`)),
}

// containerd starts the node's containerd and waits until CRI answers.
func (n *node) containerd(t *testing.T, s setup) *daemon {
	t.Helper()
	s.Node, s.Platform = n.dir, "linux/"+runtime.GOARCH
	var config bytes.Buffer
	if err := configs[n.rel.major].Execute(&config, s); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(n.dir, "containerd.toml"), config.Bytes(), 0o644); err != nil {
		t.Fatal(err)
	}
	return n.restartContainerd(t)
}

// restartContainerd starts containerd with the configuration that it had.
func (n *node) restartContainerd(t *testing.T) *daemon {
	t.Helper()
	d := n.start(t, "containerd", nil, nil, filepath.Join(n.rel.programs, "containerd"), "--config", filepath.Join(n.dir, "containerd.toml"))
	until(t, func() error {
		if err := d.alive(); err != nil {
			t.Fatal(err)
		}
		_, err := n.try(t, n.crictlArgs("version")...)
		return err
	})
	return d
}

// ctr runs ctr in the namespace "default".
func (n *node) ctr(t *testing.T, args ...string) string {
	t.Helper()
	return n.run(t, n.ctrArgs(args...)...)
}

func (n *node) ctrArgs(args ...string) []string {
	return append([]string{filepath.Join(n.rel.programs, "ctr")}, args...)
}
