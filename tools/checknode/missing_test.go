package checknode

import (
	"slices"
	"strings"
	"testing"
)

// Files that the cases below change.
const (
	ctrdFile  = "etc/containerd/conf.d/tatami.toml"
	guestDrop = "etc/kata-containers/tatami/config.d/60-tatami.toml"
	blockDrop = "etc/kata-containers/tatami-block/config.d/60-tatami.toml"
	shareConf = "etc/kata-containers/tatami-share/configuration.toml"
)

// sub replaces text in a file, which must be there.
func sub(t *testing.T, f files, file, old, with string) {
	t.Helper()
	if !strings.Contains(f[file], old) {
		t.Fatalf("%s has no %q", file, old)
	}
	f[file] = strings.Replace(f[file], old, with, 1)
}

// Each case takes one piece from a node that works. What is said must be of the
// right severity, name the right file, and have the line that mends it.
func TestMissing(t *testing.T) {
	for _, c := range []struct {
		name     string
		change   func(t *testing.T, f files)
		of       string // handler, or "" for the node
		severity Severity
		what     string
		file     string
		add      string // one of the lines
	}{
		{"proxy plugin", func(t *testing.T, f files) {
			sub(t, f, ctrdFile, "[proxy_plugins.tatami]", "[proxy_plugins.other]")
			sub(t, f, ctrdFile, "[proxy_plugins.tatami.exports]", "[proxy_plugins.other.exports]")
		}, "kata-tatami", Error, `does not know the snapshotter "tatami"`, "/etc/containerd/config.toml", `address = "/run/tatami-host/tatami.sock"`},
		{"type of the proxy", func(t *testing.T, f files) { sub(t, f, ctrdFile, `type = "snapshot"`, `type = "content"`) },
			"kata-tatami", Error, `has the type "content"`, "/" + ctrdFile, `type = "snapshot"`},
		{"address", func(t *testing.T, f files) { sub(t, f, ctrdFile, "tatami-host/tatami.sock", "tatami.sock") },
			"kata-tatami", Error, "/run/tatami.sock", "/" + ctrdFile, `address = "/run/tatami-host/tatami.sock"`},
		{"exports", func(t *testing.T, f files) { sub(t, f, ctrdFile, `enable_remote_snapshot_annotations = "true"`, "") },
			"kata-tatami", Warning, "transfer service", "/" + ctrdFile, `enable_remote_snapshot_annotations = "true"`},
		{"annotations default", func(t *testing.T, f files) { sub(t, f, ctrdFile, "disable_snapshot_annotations = false", "") },
			"kata-tatami", Error, "labels", "/etc/containerd/config.toml", "disable_snapshot_annotations = false"},
		{"annotations off", func(t *testing.T, f files) {
			sub(t, f, ctrdFile, "disable_snapshot_annotations = false", "disable_snapshot_annotations = true")
		},
			"kata-tatami-share", Error, "labels", "/" + ctrdFile, `[plugins."io.containerd.cri.v1.images"]`},
		{"discarded layers", func(t *testing.T, f files) {
			sub(t, f, ctrdFile, "discard_unpacked_layers = false", "discard_unpacked_layers = true")
		},
			"kata-tatami", Warning, "content digest not found", "/" + ctrdFile, "discard_unpacked_layers = false"},
		{"platform", func(t *testing.T, f files) {
			sub(t, f, ctrdFile, "runtime_platforms.kata-tatami]", "runtime_platforms.other]")
		},
			"kata-tatami", Error, `pulled by "overlayfs"`, "/etc/containerd/config.toml", `[plugins."io.containerd.cri.v1.images".runtime_platforms.kata-tatami]`},
		{"the runtime's snapshotter", func(t *testing.T, f files) {
			sub(t, f, ctrdFile, "privileged_without_host_devices = true", "")
			sub(t, f, ctrdFile, "containerd-shim-kata-v2\"\nsnapshotter = \"tatami\"", "containerd-shim-kata-v2\"\n")
		}, "kata-tatami", Error, `containers use "overlayfs"`, "/" + ctrdFile, `snapshotter = "tatami"`},
		{"disabled", func(t *testing.T, f files) {
			f["etc/containerd/config.toml"] += "disabled_plugins = [\"io.containerd.cri.v1.images\"]\n"
		}, "", Error, "is disabled", "/etc/containerd/config.toml", "disabled_plugins = []"},
		{"schema", func(t *testing.T, f files) { sub(t, f, "etc/containerd/config.toml", "version = 3", "version = 5") },
			"", Error, "version 5", "/etc/containerd/config.toml", "version = 4"},
		{"settings of tatami-host", func(t *testing.T, f files) { delete(f, "etc/tatami/host.toml") },
			"", Error, "no such file", "/etc/tatami/host.toml", "version = 1"},
		{"snapshotter of tatami-host", func(t *testing.T, f files) { sub(t, f, "etc/tatami/host.toml", `name = "tatami-share"`, `name = "x"`) },
			"kata-tatami-share", Error, `does not serve the snapshotter "tatami-share"`, "/etc/tatami/host.toml", `mode = "share"`},
		{"mode", func(t *testing.T, f files) { sub(t, f, "etc/tatami/host.toml", `mode = "guest"`, `mode = "gest"`) },
			"", Error, `the mode "gest"`, "/etc/tatami/host.toml", `mode = "guest"`},
		{"fallback", func(t *testing.T, f files) { sub(t, f, "etc/tatami/host.toml", `["share", "full"]`, `["all"]`) },
			"", Error, `falls back to "all"`, "/etc/tatami/host.toml", `fallback = ["share", "full"]`},
		{"discovery", func(t *testing.T, f files) { sub(t, f, "etc/tatami/host.toml", "discover = true", "discover = false") },
			"", Warning, "does not look for Kata's sandboxes", "/etc/tatami/host.toml", "discover = true"},
		{"containerd's state", func(t *testing.T, f files) { f["etc/containerd/config.toml"] += "state = \"/run/k3s/containerd\"\n" },
			"", Error, "looks in /run/containerd", "/etc/tatami/host.toml", `containerd_state = "/run/k3s/containerd"`},
		{"Kata's configuration", func(t *testing.T, f files) { delete(f, "etc/kata-containers/tatami/configuration.toml") },
			"kata-tatami", Error, "/etc/kata-containers/tatami/configuration.toml: no such file", "/" + ctrdFile, `ConfigPath = "/opt/kata/share/defaults/kata-containers/runtime-rs/configuration.toml"`},
		{"shared_fs of guest pull", func(t *testing.T, f files) { sub(t, f, guestDrop, "shared_fs = \"none\"", "") },
			"kata-tatami", Error, `shared_fs is "virtio-fs"`, "/" + guestDrop, `shared_fs = "none"`},
		{"no extension", func(t *testing.T, f files) {
			i, j := strings.Index(f[guestDrop], "[[hyper"), strings.Index(f[guestDrop], "[agent.kata]")
			f[guestDrop] = f[guestDrop][:i] + f[guestDrop][j:]
		}, "kata-tatami", Error, "no guest extension image", "/" + guestDrop, "[[hypervisor.qemu.guest_extension_images]]"},
		{"name of the extension", func(t *testing.T, f files) { sub(t, f, guestDrop, `name = "coco"`, `name = "tatami"`) },
			"kata-tatami", Error, `is called "coco"`, "/" + guestDrop, `name = "coco"`},
		{"file of the extension", func(t *testing.T, f files) { delete(f, "opt/tatami/share/tatami-guest-extension.img") },
			"kata-tatami", Error, "tatami-guest-extension.img is not there", "/" + guestDrop, "tatami guest-image build --kind extension /opt/tatami/share/tatami-guest-extension.img"},
		{"another extension", func(t *testing.T, f files) {
			sub(t, f, guestDrop, "/opt/tatami/share/tatami-guest-extension.img", "/opt/kata/share/kata-containers/kata-containers.img")
		}, "kata-tatami", Warning, "is tatami-guest in it?", "/" + guestDrop, `path = "/opt/tatami/share/tatami-guest-extension.img"`},
		{"a later drop-in replaces the array", func(t *testing.T, f files) {
			f["etc/kata-containers/tatami/config.d/70-gpu.toml"] = "[[hypervisor.qemu.guest_extension_images]]\nname = \"gpu\"\npath = \"/gpu.img\"\n"
		}, "kata-tatami", Error, "repeat its 1 entries", "/etc/kata-containers/tatami/config.d/70-gpu.toml", `name = "coco"`},
		{"kernel parameters", func(t *testing.T, f files) {
			f["etc/kata-containers/tatami/config.d/30-kernel-params.toml"] = "[hypervisor.qemu]\nkernel_params = \"quiet agent.guest_components_procs=none\"\n"
		}, "kata-tatami", Error, "keeps the agent from starting", "/" + guestDrop, `kernel_params = "quiet"`},
		{"emptyDir", func(t *testing.T, f files) { sub(t, f, guestDrop, `emptydir_mode = "block-plain"`, "") },
			"kata-tatami", Warning, "emptyDir", "/" + guestDrop, `emptydir_mode = "block-plain"`},
		{"timeout", func(t *testing.T, f files) { sub(t, f, guestDrop, "create_container_timeout = 120", "") },
			"kata-tatami", Warning, "within 30 s", "/" + guestDrop, "create_container_timeout = 120"},
		{"guest image", func(t *testing.T, f files) { delete(f, "opt/kata/share/kata-containers/kata-containers.img") },
			"kata-tatami", Error, "image is /opt/kata/share/kata-containers/kata-containers.img", "/etc/kata-containers/tatami/configuration.toml", ""},
		{"O_DIRECT", func(t *testing.T, f files) { sub(t, f, blockDrop, "cache_direct = false", "cache_direct = true") },
			"kata-tatami-block", Error, "O_DIRECT", "/" + blockDrop, "block_device_cache_direct = false"},
		{"driver of disks", func(t *testing.T, f files) {
			f[blockDrop] += "[hypervisor.qemu]\nblock_device_driver = \"virtio-blk-mmio\"\n"
		},
			"kata-tatami-block", Error, "does not start", "/" + blockDrop, ""}, // a table twice is no TOML
		{"another driver of disks", func(t *testing.T, f files) {
			sub(t, f, blockDrop, "[hypervisor.qemu]", "[hypervisor.qemu]\nblock_device_driver = \"virtio-blk-ccw\"")
		},
			"kata-tatami-block", Error, `"virtio-blk-ccw"`, "/" + blockDrop, `block_device_driver = "virtio-blk-pci"`},
		{"shared_fs of share", func(t *testing.T, f files) { sub(t, f, shareConf, `shared_fs = "virtio-fs"`, `shared_fs = "none"`) },
			"kata-tatami-share", Error, `shared_fs is "none"`, "/etc/kata-containers/tatami-share/config.d/60-tatami.toml", `shared_fs = "virtio-fs"`},
		{"virtiofsd", func(t *testing.T, f files) { delete(f, "opt/kata/libexec/virtiofsd") },
			"kata-tatami-share", Error, "virtio_fs_daemon is /opt/kata/libexec/virtiofsd", "/" + shareConf, ""},
		{"another VMM", func(t *testing.T, f files) {
			f["etc/kata-containers/tatami-block/configuration.toml"] = strings.ReplaceAll(kataQEMU, "qemu", "clh")
			f[blockDrop] = strings.ReplaceAll(f[blockDrop], "hypervisor.qemu", "hypervisor.clh")
		}, "kata-tatami-block", Warning, "not been tried with clh", "", ""},
		{"broken drop-in", func(t *testing.T, f files) { f[guestDrop] = "[hypervisor.qemu]\nshared_fs = none\n" },
			"kata-tatami", Error, "60-tatami.toml: line 2, column 13", "/" + guestDrop, ""},
		{"runc in mode guest", func(t *testing.T, f files) {
			f["etc/containerd/config.toml"] += "[plugins.\"io.containerd.cri.v1.images\"]\nsnapshotter = \"tatami\"\n"
		}, "runc", Error, "needs Kata Containers", "", ""},
		{"mount helper", func(t *testing.T, f files) { f["opt/tatami/bin/nydus-overlayfs-tatami"] = "not a program" },
			"", Error, "nydus-overlayfs-tatami is not there or cannot be run", "", "install -D -t /opt/tatami/bin nydus-overlayfs-tatami"},
		{"mount helper elsewhere", func(t *testing.T, f files) {
			sub(t, f, "etc/tatami/host.toml", "version = 1", "version = 1\nmount_helper = \"/usr/bin/nydus-overlayfs-tatami\"")
		},
			"", Error, "/usr/bin/nydus-overlayfs-tatami is not there or cannot be run", "", "install -D -t /usr/bin nydus-overlayfs-tatami"},
		{"mount.fuse", func(t *testing.T, f files) { delete(f, "usr/sbin/mount.fuse") }, "", Error, "mount.fuse", "", "apt-get install fuse3"},
		{"FUSE", func(t *testing.T, f files) { delete(f, "dev/fuse") }, "", Error, "/dev/fuse", "/etc/modules-load.d/tatami.conf", "modprobe fuse"},
		{"loop devices", func(t *testing.T, f files) { delete(f, "dev/loop-control") }, "", Error, "/dev/loop-control", "", "modprobe loop"},
		{"vhost-vsock", func(t *testing.T, f files) { delete(f, "dev/vhost-vsock") }, "", Error, "/dev/vhost-vsock", "", "modprobe vhost_vsock"},
		{"EROFS", func(t *testing.T, f files) { delete(f, "lib/modules/"+release+"/modules.dep") }, "", Error, "no file system erofs", "", ""},
		{"not running", func(t *testing.T, f files) { delete(f, "proc/sys/kernel/osrelease") }, "", Note, "does not run", "", ""},
	} {
		t.Run(c.name, func(t *testing.T) {
			f := installed(t)
			c.change(t, f)
			r, err := Check(t.Context(), Options{Root: f.write(t), Version: "2.4.2"})
			if err != nil {
				t.Fatal(err)
			}
			list := findingsOf(r, c.of)
			i := slices.IndexFunc(list, func(f Finding) bool {
				return f.Severity == c.severity && strings.Contains(f.What, c.what)
			})
			if i < 0 {
				t.Fatalf("not found; of %q there are %+v", c.of, list)
			}
			got := list[i]
			if c.file != "" && got.File != c.file || c.add != "" && !slices.Contains(got.Add, c.add) {
				t.Errorf("file %s, add %q", got.File, got.Add)
			}
			if r.Works == (c.severity == Error) {
				t.Errorf("works: %v", r.Works)
			}
		})
	}
}

func findingsOf(r *Report, handler string) []Finding {
	for _, h := range r.Handlers {
		if h.Name == handler {
			return h.Findings
		}
	}
	return r.Findings
}

// From Linux 6.12 on, images are mounted from files, without loop devices.
func TestFileBacked(t *testing.T) {
	f := installed(t)
	f["proc/sys/kernel/osrelease"] = "6.12.9\n"
	f["proc/filesystems"] += "nodev\terofs\n"
	delete(f, "dev/loop-control")
	r, err := Check(t.Context(), Options{Root: f.write(t), Version: "2.4.2"})
	if err != nil || !r.Works {
		t.Errorf("%v, %+v", err, r.Findings)
	}
}

// containerd 1.x: an imported file with handlers hides those of the main file,
// and lines that are missing belong into the file that wins.
func TestImportsOfOld(t *testing.T) {
	f := installedV2(t)
	text := f["etc/containerd/config.toml"]
	f["etc/containerd/tatami.toml"] = strings.Replace(text, "disable_snapshot_annotations = false", "", 1)
	f["etc/containerd/config.toml"] = `version = 2
imports = ["tatami.toml"]
[plugins."io.containerd.grpc.v1.cri".containerd]
disable_snapshot_annotations = false
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.mine]
runtime_type = "io.containerd.runc.v2"
`
	root := f.write(t)
	for version, want := range map[string]bool{"1.7.27": false, "2.4.2": true} {
		r, err := Check(t.Context(), Options{Root: root, Version: version})
		if err != nil {
			t.Fatal(err)
		}
		mine := slices.ContainsFunc(r.Handlers, func(h Handler) bool { return h.Name == "mine" })
		labels := !slices.ContainsFunc(findingsOf(r, "kata-tatami"), func(f Finding) bool {
			return strings.Contains(f.What, "labels with") && f.File == "/etc/containerd/tatami.toml"
		})
		if mine != want || labels != want {
			t.Errorf("containerd %s: handler of the main file %v, its setting %v", version, mine, labels)
		}
	}
}

// containerd 1.6 ignores a handler's snapshotter; the line to add is another.
func TestOldContainerd(t *testing.T) {
	r, err := Check(t.Context(), Options{Root: installedV2(t).write(t), Version: "1.6.20"})
	if err != nil {
		t.Fatal(err)
	}
	want := []string{`[plugins."io.containerd.grpc.v1.cri".containerd]`, `snapshotter = "tatami-share"`}
	list := findingsOf(r, "kata-tatami-share")
	if len(list) != 1 || !slices.Equal(list[0].Add, want) || r.Works {
		t.Errorf("%+v", list)
	}
}
