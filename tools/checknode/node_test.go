package checknode

import (
	"bytes"
	"flag"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

var update = flag.Bool("update", false, "write the golden files anew")

// files are those of a node: path and text.
type files map[string]string

// write makes a node's file system.
func (f files) write(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	for name, text := range f {
		p := filepath.Join(root, name)
		if err := os.MkdirAll(filepath.Dir(p), 0o755); err != nil {
			t.Fatal(err)
		}
		mode := os.FileMode(0o644)
		if text == program {
			mode = 0o755
		}
		if err := os.WriteFile(p, []byte(text), mode); err != nil {
			t.Fatal(err)
		}
	}
	return root
}

// program stands for a program or a disk image, of which only being there counts.
const program = "\x7fELF"

// Parts of Kata's configuration files, with the keys of kata-containers
// src/runtime-rs/config and src/runtime/config.
const (
	kataQEMU = `[hypervisor.qemu]
path = "/opt/kata/bin/qemu-system-x86_64"
image = "/opt/kata/share/kata-containers/kata-containers.img"
kernel_params = ""
shared_fs = "virtio-fs"
virtio_fs_daemon = "/opt/kata/libexec/virtiofsd"
block_device_driver = "virtio-scsi"
block_device_cache_direct = false
[agent.kata]
create_container_timeout = 30
[runtime]
name = "virt_container"
hypervisor_name = "qemu"
agent_name = "kata"
emptydir_mode = "shared-fs"
`
	kataGo = `[hypervisor.qemu]
path = "/opt/kata/bin/qemu-system-x86_64"
image = "/opt/kata/share/kata-containers/kata-containers.img"
shared_fs = "virtio-fs"
virtio_fs_daemon = "/opt/kata/libexec/virtiofsd"
[agent.kata]
dial_timeout = 45
[runtime]
internetworking_model = "tcfilter"
create_container_timeout = 60
`
	kataFirecracker = `[hypervisor.firecracker]
image = "/opt/kata/share/kata-containers/kata-containers.img"
block_device_driver = "virtio-blk-mmio"
kernel_params = "console=ttyS0 agent.log_vport=1025"
[agent.kata]
create_container_timeout = 30
[runtime]
name = "virt_container"
hypervisor_name = "firecracker"
agent_name = "kata"
emptydir_mode = "shared-fs"
`
)

// release of the kernel of the nodes here.
const release = "6.1.0-30-amd64"

// base is a node with Kata Containers, before Tatami.
func base() files {
	return files{
		"opt/kata/share/kata-containers/kata-containers.img": program,
		"opt/kata/libexec/virtiofsd":                         program,
		"usr/sbin/mount.fuse":                                program,
		"dev/fuse":                                           program,
		"dev/loop-control":                                   program,
		"dev/vhost-vsock":                                    program,
		"proc/sys/kernel/osrelease":                          release + "\n",
		"proc/filesystems":                                   "nodev\tsysfs\nnodev\toverlay\n\text4\n",
		"lib/modules/" + release + "/modules.dep":            "kernel/fs/erofs/erofs.ko.xz: kernel/lib/libcrc32c.ko\n",
	}
}

// shipped is a file of tools/deploy.
func shipped(t *testing.T, name string) string {
	t.Helper()
	text, err := os.ReadFile(filepath.Join("..", "deploy", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(text)
}

// installed is a node set up as tools/deploy/install.md says, with containerd 2.x.
func installed(t *testing.T) files {
	f := base()
	maps.Copy(f, files{
		"etc/containerd/config.toml":                               "version = 3\nimports = [\"/etc/containerd/conf.d/*.toml\"]\n",
		"etc/containerd/conf.d/tatami.toml":                        shipped(t, "containerd/config-v3.toml"),
		"etc/tatami/host.toml":                                     shipped(t, "host.toml"),
		"opt/tatami/bin/nydus-overlayfs-tatami":                    program,
		"opt/tatami/share/tatami-guest-extension.img":              program,
		"etc/kata-containers/tatami/configuration.toml":            kataQEMU,
		"etc/kata-containers/tatami/config.d/60-tatami.toml":       shipped(t, "kata/qemu-runtime-rs-guest.toml"),
		"etc/kata-containers/tatami-block/configuration.toml":      kataQEMU,
		"etc/kata-containers/tatami-block/config.d/60-tatami.toml": shipped(t, "kata/qemu-runtime-rs-block.toml"),
		"etc/kata-containers/tatami-share/configuration.toml":      kataQEMU,
	})
	return f
}

// installedV2 is the same with containerd 1.x: no imports, no mode block.
func installedV2(t *testing.T) files {
	f := installed(t)
	f["etc/containerd/config.toml"] = shipped(t, "containerd/config-v2.toml")
	delete(f, "etc/containerd/conf.d/tatami.toml")
	return f
}

// kataDeploy is a node that kata-deploy 4.1 set up from kata-deploy/values.yaml:
// its layout of files (tools/packaging/kata-deploy/binary/src/artifacts/install.rs,
// install_custom_runtime_configs; src/runtime/containerd.rs).
func kataDeploy(t *testing.T) files {
	f := base()
	v3, handlers, _ := strings.Cut(shipped(t, "containerd/config-v3.toml"), "# Handlers.")
	handlers = "version = 3\n" + handlers[strings.Index(handlers, "["):]
	const custom = "opt/kata/share/defaults/kata-containers/custom-runtimes/kata-"
	handlers = strings.ReplaceAll(handlers, `/etc/kata-containers/`, "/"+custom)
	handlers = strings.ReplaceAll(handlers, `/configuration.toml`, `/configuration-qemu-runtime-rs.toml`)
	maps.Copy(f, files{
		"etc/containerd/config.toml": "version = 3\nimports = [\"/opt/kata/containerd/config.d/kata-deploy.toml\", " +
			"\"/opt/kata/containerd/config.d/zz-kata-deploy-user.toml\"]\n",
		"opt/kata/containerd/config.d/kata-deploy.toml":         handlers,
		"opt/kata/containerd/config.d/zz-kata-deploy-user.toml": v3,
		"etc/tatami/host.toml":                                  shipped(t, "host.toml"),
		"opt/tatami/bin/nydus-overlayfs-tatami":                 program,
		"opt/tatami/share/tatami-guest-extension.img":           program,
		custom + "tatami/config.d/10-installation-prefix.toml":  "[hypervisor.qemu]\npath = \"/opt/kata/bin/qemu-system-x86_64\"\n",
		custom + "tatami/config.d/50-overrides.toml":            shipped(t, "kata/qemu-runtime-rs-guest.toml"),
		custom + "tatami-block/config.d/50-overrides.toml":      shipped(t, "kata/qemu-runtime-rs-block.toml"),
	})
	for _, h := range []string{"tatami", "tatami-block", "tatami-share"} {
		f[custom+h+"/configuration-qemu-runtime-rs.toml"] = kataQEMU
	}
	return f
}

// k3s has its own place for containerd's configuration, and one drop-in directory
// for each schema.
func k3s(t *testing.T) files {
	f := installed(t)
	delete(f, "etc/containerd/config.toml")
	delete(f, "etc/containerd/conf.d/tatami.toml")
	const dir = "var/lib/rancher/k3s/agent/etc/containerd/"
	f[dir+"config.toml"] = `version = 3
imports = ["/var/lib/rancher/k3s/agent/etc/containerd/config-v3.toml.d/*.toml"]
root = "/var/lib/rancher/k3s/agent/containerd"
state = "/run/k3s/containerd"
[plugins.'io.containerd.cri.v1.images']
snapshotter = "overlayfs"
disable_snapshot_annotations = true
`
	f[dir+"config-v3.toml.d/tatami.toml"] = shipped(t, "containerd/config-v3.toml")
	f["etc/tatami/host.toml"] = strings.Replace(f["etc/tatami/host.toml"], `"/run/containerd"`, `"/run/k3s/containerd"`, 1)
	return f
}

func TestNodes(t *testing.T) {
	for _, c := range []struct {
		name  string
		files files
		opts  Options
		works bool
	}{
		{"installed", installed(t), Options{Version: "2.4.2"}, true},
		{"containerd-2.1", installed(t), Options{Version: "2.1.5"}, false}, // no mode block
		{"containerd-1.7", installedV2(t), Options{Version: "1.7.27"}, true},
		{"v2-on-2.4", installedV2(t), Options{Version: "2.4.2"}, false},
		{"kata-deploy", kataDeploy(t), Options{Version: "2.3.1"}, true},
		{"k3s", k3s(t), Options{Version: "2.2.2-k3s1", Containerd: "/var/lib/rancher/k3s/agent/etc/containerd/config.toml"}, true},
		{"debian-1.6", debian(t), Options{Version: "1.6.20~ds1"}, true},
		{"go-runtime", goRuntime(t), Options{Version: "2.4.2"}, false}, // no mode block
		{"firecracker", firecrackers(t), Options{Version: "2.4.2"}, false},
		{"without-tatami", bareNode(), Options{Version: "1.7.27"}, false},
		{"version-from-schema", installed(t), Options{}, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			c.opts.Root = c.files.write(t)
			r, err := Check(t.Context(), c.opts)
			if err != nil {
				t.Fatal(err)
			}
			if r.Works != c.works {
				t.Errorf("works: %v", r.Works)
			}
			var out bytes.Buffer
			r.WriteText(&out)
			golden(t, c.name, out.Bytes())
		})
	}
}

func golden(t *testing.T, name string, got []byte) {
	t.Helper()
	file := filepath.Join("testdata", name+".txt")
	if *update {
		if err := os.MkdirAll("testdata", 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(file, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(got, want) {
		t.Errorf("%s differs; run the test with -update and look at it. Got:\n%s", file, got)
	}
}

// debian has containerd 1.6, which knows one snapshotter for all.
func debian(t *testing.T) files {
	f := installedV2(t)
	text := strings.Replace(shipped(t, "containerd/config-v2.toml"), "# snapshotter =", "snapshotter =", 1)
	text, _, _ = strings.Cut(text, `[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata-tatami]`)
	f["etc/containerd/config.toml"] = text + `
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.kata]
runtime_type = "io.containerd.kata.v2"
`
	f["opt/kata/share/defaults/kata-containers/runtime-rs/configuration.toml"] = kataQEMU
	return f
}

func goRuntime(t *testing.T) files {
	f := installed(t)
	for _, h := range []string{"tatami", "tatami-block", "tatami-share"} {
		f["etc/kata-containers/"+h+"/configuration.toml"] = kataGo
	}
	f["etc/kata-containers/tatami/config.d/60-tatami.toml"] = shipped(t, "kata/qemu-guest.toml")
	return f
}

func firecrackers(t *testing.T) files {
	f := installed(t)
	for _, h := range []string{"tatami", "tatami-block", "tatami-share"} {
		f["etc/kata-containers/"+h+"/configuration.toml"] = kataFirecracker
	}
	delete(f, "etc/kata-containers/tatami-block/config.d/60-tatami.toml")
	f["etc/kata-containers/tatami/config.d/60-tatami.toml"] = shipped(t, "kata/firecracker-guest.toml")
	f["opt/tatami/share/kata-guest-tatami.img"] = program
	return f
}

func bareNode() files {
	f := base()
	f["etc/containerd/config.toml"] = "version = 2\n"
	return f
}
