package checknode

import (
	"fmt"
	"io/fs"
	"path"
	"slices"
	"strings"
)

// Shims of Kata.
const (
	rust   = "runtime-rs"
	golang = "go"
)

// Where a shim looks for its configuration when containerd names none
// (src/libs/kata-types/src/config/default.rs; GetDefaultConfigFilePaths of
// src/runtime/pkg/katautils/config.go with the prefix of release builds).
var (
	rustFiles = []string{
		"/etc/kata-containers/runtime-rs/configuration.toml",
		"/usr/share/defaults/kata-containers/runtime-rs/configuration.toml",
		"/opt/kata/share/defaults/kata-containers/runtime-rs/configuration.toml",
	}
	goFiles = []string{
		"/etc/kata-containers/configuration.toml",
		"/usr/share/defaults/kata-containers/configuration.toml",
		"/opt/kata/share/defaults/kata-containers/configuration.toml",
	}
)

// Kinds of hypervisor, as Kata's tables are called.
const (
	qemu        = "qemu"
	clh         = "clh"
	dragonball  = "dragonball"
	firecracker = "firecracker"
)

// kata is the effective configuration of one handler.
type kata struct {
	tree     tree
	set      *settings
	base     string // the file that containerd names or the shim finds, without links
	shim     string // rust or golang
	vmm      string
	findings []Finding // of reading
}

func (k *kata) String() string { return k.shim + ", " + k.vmm }

func (k *kata) files() []string { return k.set.files }

// kata reads the configuration of a handler; nil when it is not Kata's.
func (n *node) kata(c *containerd, name string) *kata {
	at := append(c.runtimes(), name)
	kind, program := c.set.text(append(at, "runtime_type")...), c.set.text(append(at, "runtime_path")...)
	if !strings.HasPrefix(kind, "io.containerd.kata") && !strings.HasPrefix(path.Base(program), "containerd-shim-kata") {
		return nil
	}
	k := &kata{tree: n.files, set: newSettings(), shim: rust, vmm: "?"}
	k.base = textOr(c.set.value(append(at, "options", "ConfigPath")...), k.find(program))
	base, err := n.files.resolve(k.base)
	if err != nil {
		keys := append(at, "options", "ConfigPath")
		k.fail(c.place(at...), "Kata's configuration is not there: "+err.Error(), lines(keys, rustFiles[2])...)
		return k
	}
	k.base = base
	k.load()
	k.recognise()
	return k
}

// find is what the shim would find by itself: the default of Kata 4 is
// runtime-rs.
func (k *kata) find(program string) string {
	order := append(slices.Clone(rustFiles), goFiles...)
	if program != "" && !strings.Contains(program, rust) {
		order = goFiles
	}
	for _, f := range order {
		if k.tree.exists(f) {
			return f
		}
	}
	return order[0]
}

func (k *kata) fail(file, what string, add ...string) {
	k.findings = append(k.findings, Finding{Severity: Error, What: what, File: file, Add: add})
}

// load merges the base file and all of config.d beside it, by name (drop_in.rs,
// update_from_dropins; config.go, decodeDropIns).
func (k *kata) load() {
	base, err := k.tree.parse(k.base)
	if err != nil {
		k.fail(k.base, "Kata does not start: "+err.Error())
		return
	}
	k.set.merge(k.base, base)
	dir := path.Join(path.Dir(k.base), "config.d")
	list, err := k.tree.list(dir)
	if err != nil && !notThere(err) {
		k.fail(dir, "Kata does not start: "+err.Error())
	}
	k.recognise()
	for _, e := range list {
		file := path.Join(dir, e.Name())
		// DirEntry::file_type of runtime-rs does not follow links.
		if k.shim == rust && e.Type()&fs.ModeSymlink != 0 {
			k.fail(file, "runtime-rs does not start: a drop-in is a link, and it takes files only")
			continue
		}
		t, err := k.tree.parse(file)
		if err != nil {
			k.fail(file, "Kata does not start: "+err.Error())
			continue
		}
		k.set.merge(file, t)
	}
}

// recognise tells the shim and the hypervisor from the configuration: only that
// of runtime-rs names both (configuration-*.toml.in of either).
func (k *kata) recognise() {
	if len(k.set.files) == 0 {
		return
	}
	if name := k.set.text("runtime", "hypervisor_name"); name != "" {
		k.shim, k.vmm = rust, name
		return
	}
	k.shim = golang
	for _, v := range []string{qemu, clh, firecracker, "stratovirt", "remote"} {
		if k.set.table("hypervisor", v) != nil {
			k.vmm = v
			return
		}
	}
}

// hv is a key of the hypervisor's table.
func (k *kata) hv(key string) []string { return []string{"hypervisor", k.vmm, key} }

// sharedFS is what the VM shares with the node; "none" for nothing.
func (k *kata) sharedFS() string {
	if k.vmm == firecracker {
		return "none" // it can share nothing
	}
	return textOr(k.set.value(k.hv("shared_fs")...), "virtio-fs")
}

// place is the drop-in in which a line may be added: one that sorts behind all
// files that are there, so that nothing replaces it; or the file that has the key.
func (k *kata) place(keys ...string) string {
	if f := k.set.file(keys...); f != "" && path.Base(path.Dir(f)) == "config.d" && !generated(f) {
		return f
	}
	return path.Join(path.Dir(k.base), "config.d", "60-tatami.toml")
}

// generated says that kata-deploy writes a drop-in (docs/runtime-configuration.md,
// "Reserved prefixes").
func generated(file string) bool {
	name := path.Base(file)
	return slices.ContainsFunc([]string{"10-", "20-", "22-", "25-", "30-", "50-"}, func(p string) bool { return strings.HasPrefix(name, p) })
}

// wrong is a finding about a key and its remedy.
func (k *kata) wrong(s Severity, keys []string, value, what string) Finding {
	last := len(keys) - 1
	return Finding{Severity: s, What: what, File: k.place(keys...), Add: []string{header(keys[:last]...), keys[last] + " = " + value}}
}

// has says that a file which the configuration names is there.
func (k *kata) has(keys []string) []Finding {
	file := k.set.text(keys...)
	if file == "" || k.tree.exists(file) {
		return nil
	}
	return []Finding{{Severity: Error, What: fmt.Sprintf("%s is %s, which is not there", keys[len(keys)-1], file), File: k.set.file(keys...)}}
}
