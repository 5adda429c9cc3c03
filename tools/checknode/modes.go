package checknode

import (
	"fmt"
	"path"
	"slices"
	"strings"
)

// extension is the only guest extension whose programs the agent starts
// (src/agent/src/guest_extension_image.rs, COCO_EXTENSION_NAME).
const extension = "coco"

// extensionFile is where the extension image lies.
const extensionFile = "/opt/tatami/share/tatami-guest-extension.img"

// comfortable is how many seconds a container may take to start on a bad day.
const comfortable = 60

// canServe says what stands against a mode in this configuration.
func (k *kata) canServe(mode string) []Finding {
	if len(k.set.files) == 0 || failed(k.findings) {
		return k.findings
	}
	out := k.has(k.hv("image"))
	switch mode {
	case modeGuest:
		out = append(out, k.guest()...)
	case modeBlock:
		out = append(out, k.block()...)
	case modeNydus:
		out = append(out, k.nydus()...)
	default:
		return append(out, k.share(mode)...)
	}
	return append(out, k.timeout()...)
}

// guest: the agent gets a volume image_guest_pull and asks tatami-guest.
func (k *kata) guest() []Finding {
	var out []Finding
	// runtime-rs takes such a volume only without a shared file system
	// (crates/resource/src/rootfs/mod.rs, is_guest_pull_volume); the Go runtime
	// takes it always (virtcontainers/fs_share_linux.go).
	if k.shim == rust && k.sharedFS() != "none" {
		out = append(out, k.wrong(Error, k.hv("shared_fs"), `"none"`,
			fmt.Sprintf("shared_fs is %q: runtime-rs pulls in the guest only without", k.sharedFS())))
	}
	emptyDir := []string{"runtime", "emptydir_mode"}
	if k.sharedFS() == "none" && textOr(k.set.value(emptyDir...), "shared-fs") == "shared-fs" {
		out = append(out, k.wrong(Warning, emptyDir, `"block-plain"`, "without a shared file system an emptyDir lies in the VM's memory"))
	}
	if k.vmm == qemu {
		return append(out, k.extension()...)
	}
	return append(out, Finding{Severity: Note, What: fmt.Sprintf(
		"with %s tatami-guest must be part of the guest image %s (`tatami guest-image build --kind tarball`); that was not looked at",
		k.vmm, k.set.text(k.hv("image")...))})
}

// extension looks for the extension image and for what keeps the agent from
// starting its programs.
func (k *kata) extension() []Finding {
	keys := k.hv("guest_extension_images")
	file := ""
	list, _ := k.set.value(keys...).([]any)
	for _, v := range list {
		if t := asTable(v); textOr(t["name"], "") == extension {
			file = textOr(t["path"], "")
		}
	}
	var out []Finding
	switch {
	case file == "":
		what := "the VM has no guest extension image: nothing pulls in the guest"
		if len(list) > 0 {
			what = fmt.Sprintf("no guest extension image is called %q; this array replaces the present one, so repeat its %d entries", extension, len(list))
		}
		out = append(out, Finding{Severity: Error, What: what, File: k.place(keys...), Add: []string{
			"[" + header(keys...) + "]", fmt.Sprintf("name = %q", extension), fmt.Sprintf("path = %q", extensionFile), `verity_params = ""`}})
	case !k.tree.exists(file):
		out = append(out, Finding{Severity: Error, File: k.set.file(keys...), Add: []string{"tatami guest-image build --kind extension " + file},
			What: fmt.Sprintf("the guest extension image %s is not there; build it", file)})
	case !strings.Contains(path.Base(file), "tatami"):
		out = append(out, Finding{Severity: Warning, File: k.place(keys...), Add: []string{fmt.Sprintf("path = %q", extensionFile)},
			What: fmt.Sprintf("the guest extension image is %s; is tatami-guest in it?", file)})
	}
	return append(out, k.processes()...)
}

// processes looks for the kernel parameter that keeps the agent from starting
// anything (src/agent/src/config.rs, GuestComponentsProcs).
func (k *kata) processes() []Finding {
	const none = "agent.guest_components_procs=none"
	keys := k.hv("kernel_params")
	var kept []string
	off := false
	for _, word := range strings.Fields(k.set.text(keys...)) {
		if word == none {
			off = true
		} else {
			kept = append(kept, word)
		}
	}
	if !off {
		return nil
	}
	return []Finding{k.wrong(Error, keys, fmt.Sprintf("%q", strings.Join(kept, " ")), none+" keeps the agent from starting tatami-guest")}
}

// block: a raw EROFS disk and perhaps an ext4 one
// (src/runtime-rs/crates/resource/src/rootfs/erofs_rootfs.rs).
func (k *kata) block() []Finding {
	if k.shim != rust {
		return []Finding{{Severity: Error, What: "mode block needs runtime-rs; the Go runtime takes EROFS only mounted on the node"}}
	}
	var out []Finding
	driver := k.hv("block_device_driver")
	// The agent's drivers: src/agent/src/storage/multi_layer_erofs.rs,
	// resolve_base_device_path.
	switch d := textOr(k.set.value(driver...), "virtio-blk-pci"); {
	case k.vmm == firecracker:
		return []Finding{{Severity: Error, What: "mode block cannot work with Firecracker: its disks are virtio-blk-mmio, which the agent does not take"}}
	case d != "virtio-blk-pci" && d != "virtio-scsi":
		out = append(out, k.wrong(Error, driver, `"virtio-blk-pci"`, fmt.Sprintf("block_device_driver is %q, which the agent does not take for images", d)))
	}
	if k.vmm != qemu {
		out = append(out, Finding{Severity: Warning, What: fmt.Sprintf("mode block has not been tried with %s", k.vmm)})
	}
	direct := k.hv("block_device_cache_direct")
	if on, _ := k.set.value(direct...).(bool); on {
		out = append(out, k.wrong(Error, direct, "false", "disks are opened with O_DIRECT, which goes around the node's page cache and may fail on FUSE"))
	}
	return out
}

// share: the image is mounted on the node and shared; full: unpacked there.
func (k *kata) share(mode string) []Finding {
	switch {
	case k.vmm == firecracker:
		return []Finding{{Severity: Error, What: fmt.Sprintf("mode %s needs a shared file system, which Firecracker has not", mode)}}
	case k.sharedFS() == "none":
		value := `"virtio-fs"`
		if k.vmm == dragonball {
			value = `"inline-virtio-fs"`
		}
		return []Finding{k.wrong(Error, k.hv("shared_fs"), value, fmt.Sprintf(`mode %s needs a shared file system; shared_fs is "none"`, mode))}
	case k.sharedFS() == "virtio-fs", k.sharedFS() == nydusFS:
		return k.has(k.hv("virtio_fs_daemon"))
	}
	return nil
}

// What mode nydus needs in the configuration: the two runtimes start the daemon in
// src/runtime/virtcontainers/nydusd.go and
// src/runtime-rs/crates/resource/src/share_fs/nydus/nydus_daemon.rs.
const (
	nydusFS     = "virtio-fs-nydus"
	daemonFile  = "/opt/tatami/bin/tatami-virtiofsd"
	passthrough = "--passthrough"
)

// nydus: our daemon shows the image and Kata's shared directory.
func (k *kata) nydus() []Finding {
	if k.vmm != qemu && k.vmm != clh { // errNydusdNotSupport in nydusd.go
		return []Finding{{Severity: Error, What: fmt.Sprintf("mode nydus needs QEMU; Kata starts no daemon of its own for %s", k.vmm)}}
	}
	var out []Finding
	if k.vmm == clh {
		out = append(out, Finding{Severity: Warning, What: "mode nydus has not been tried with clh"})
	}
	if fs := k.sharedFS(); fs != nydusFS {
		out = append(out, k.wrong(Error, k.hv("shared_fs"), fmt.Sprintf("%q", nydusFS), fmt.Sprintf("mode nydus needs shared_fs = %q; it is %q", nydusFS, fs)))
	}
	daemon := k.hv("virtio_fs_daemon")
	if file := k.set.text(daemon...); !strings.HasPrefix(path.Base(file), "tatami-virtiofsd") {
		return append(out, k.wrong(Error, daemon, fmt.Sprintf("%q", daemonFile), fmt.Sprintf("virtio_fs_daemon is %s, which cannot show Tatami's images", file)))
	}
	args := k.hv("virtio_fs_extra_args")
	if given := texts(k.set.value(args...)); !slices.Contains(given, passthrough) {
		out = append(out, k.wrong(Error, args, fmt.Sprintf("[%q]", passthrough), "virtio_fs_extra_args has no "+passthrough+": tatami-virtiofsd does not share Kata's directory, and no VM starts"))
	}
	return append(out, k.has(daemon)...)
}

// timeout warns of a short one. The key's table and default differ
// (src/runtime-rs/Makefile: 30; src/runtime/Makefile: 60).
func (k *kata) timeout() []Finding {
	keys, seconds := []string{"runtime", "create_container_timeout"}, int64(60)
	if k.shim == rust {
		keys, seconds = []string{"agent", textOr(k.set.value("runtime", "agent_name"), "kata"), "create_container_timeout"}, 30
	}
	if v, ok := k.set.value(keys...).(int64); ok {
		seconds = v
	}
	if seconds >= comfortable {
		return nil
	}
	return []Finding{k.wrong(Warning, keys, "120", fmt.Sprintf("a container must start within %d s; a slow registry may need longer", seconds))}
}
