package checknode

import (
	"fmt"
	"path"
	"strings"
)

// handler says what a handler of containerd would do with an image.
func (n *node) handler(c *containerd, h *host, name string) Handler {
	at := append(c.runtimes(), name)
	out := Handler{Name: name, Runtime: c.set.text(append(at, "runtime_type")...), Findings: []Finding{}}
	out.Snapshotter = c.snapshotter(name)
	k := n.kata(c, name)
	if k != nil {
		out.Runtime, out.Config = k.String(), k.files()
	}
	pulls := c.pullSnapshotter(name)
	wanted := c.set.text(append(at, "snapshotter")...)
	switch {
	case h.ours(out.Snapshotter, c.address(out.Snapshotter)):
	case h.ours(pulls, c.address(pulls)), h.ours(wanted, c.address(wanted)):
		out.Mode = "?"
		out.Findings = append(out.Findings, c.halfway(name, wanted, pulls))
		return out
	default:
		return out
	}
	s := h.named(out.Snapshotter)
	out.Mode = "?"
	out.Findings = append(out.Findings, c.checkPull(name, out.Snapshotter)...)
	out.Findings = append(out.Findings, c.checkProxy(h, out.Snapshotter)...)
	if s == nil {
		out.Findings = append(out.Findings, notServed(h, out.Snapshotter))
		return out
	}
	out.Mode = s.Mode
	out.Findings = append(out.Findings, c.checkMode(s, k)...)
	return out
}

// snapshotter is the one of a handler's containers.
func (c *containerd) snapshotter(name string) string {
	own := c.set.text(append(c.runtimes(), name, "snapshotter")...)
	if own != "" && c.version.atLeast(1, 7) { // Runtime.Snapshotter of pkg/cri/config/config.go, since 1.7
		return own
	}
	return c.defaultSnapshotter()
}

func (c *containerd) defaultSnapshotter() string {
	return textOr(c.set.value(append(c.images(), "snapshotter")...), "overlayfs")
}

// pullSnapshotter is the one by which a handler's images are pulled, when kubelet
// or an annotation says which handler it is.
func (c *containerd) pullSnapshotter(name string) string {
	if !c.split {
		return c.snapshotter(name)
	}
	return textOr(c.set.value(c.platform(name)...), c.defaultSnapshotter())
}

// platform is the key of the snapshotter of a handler's pulls, containerd 2.x
// (RuntimePlatforms of internal/cri/config/config.go).
func (c *containerd) platform(name string) []string {
	return append(c.images(), "runtime_platforms", name, "snapshotter")
}

func (c *containerd) address(snapshotter string) string {
	return c.set.text("proxy_plugins", snapshotter, "address")
}

// halfway is a handler of which only pulls, or only a key that this containerd
// does not read, name Tatami.
func (c *containerd) halfway(name, wanted, pulls string) Finding {
	if !c.version.atLeast(1, 7) {
		keys := append(c.images(), "snapshotter")
		return Finding{Severity: Error, File: c.place(keys...), Add: lines(keys, wanted),
			What: fmt.Sprintf("containerd %s has no snapshotter per handler: it ignores %q and uses %q for all", c.version, wanted, c.defaultSnapshotter())}
	}
	keys := append(c.runtimes(), name, "snapshotter")
	return Finding{Severity: Error, File: c.place(append(c.runtimes(), name)...), Add: lines(keys, pulls),
		What: fmt.Sprintf("images are pulled by %q, but containers use %q", pulls, c.snapshotter(name))}
}

// lines are the lines that set a key to a text.
func lines(keys []string, value string) []string {
	last := len(keys) - 1
	return []string{header(keys[:last]...), fmt.Sprintf("%s = %q", keys[last], value)}
}

// checkPull says whether images are pulled by the snapshotter s, and with labels.
func (c *containerd) checkPull(name, s string) []Finding {
	var out []Finding
	if c.pullSnapshotter(name) != s {
		keys := c.platform(name)
		what := fmt.Sprintf("images are pulled by %q, and containers then by %q: they are not lazy", c.pullSnapshotter(name), s)
		if c.schema < 3 {
			what += fmt.Sprintf(" (a configuration of version %d cannot say it to containerd %s; this table may stand in it all the same)", c.schema, c.version)
		}
		out = append(out, Finding{Severity: Error, What: what, File: c.place(keys...), Add: lines(keys, s)})
	}
	annotations := append(c.images(), "disable_snapshot_annotations")
	if off, set := c.set.value(annotations...).(bool); !set || off { // the default is true
		out = append(out, Finding{Severity: Error, File: c.place(annotations...),
			What: "snapshotters get no labels with the image's name: nothing is lazy",
			Add:  []string{header(c.images()...), "disable_snapshot_annotations = false"}})
	}
	discard := append(c.images(), "discard_unpacked_layers")
	if on, _ := c.set.value(discard...).(bool); on {
		out = append(out, Finding{Severity: Warning, File: c.place(discard...),
			What: `unpacked layers are discarded: an image that two snapshotters use fails with "content digest not found"`,
			Add:  []string{header(c.images()...), "discard_unpacked_layers = false"}})
	}
	if c.defaultSnapshotter() != s && !c.version.atLeast(2, 3) {
		out = append(out, Finding{Severity: Note, Add: []string{"io.containerd.cri.runtime-handler: " + name},
			What: fmt.Sprintf("containerd %s learns the handler at a pull only from this annotation of the pod", c.version)})
	} else if c.defaultSnapshotter() != s {
		out = append(out, Finding{Severity: Note, Add: []string{"io.containerd.cri.runtime-handler: " + name},
			What: "kubelet says the handler at a pull only with its feature gate RuntimeClassInImageCriApi; without it pods need this annotation"})
	}
	return out
}

// checkProxy looks at the proxy plugin of the snapshotter s.
func (c *containerd) checkProxy(h *host, s string) []Finding {
	address := path.Join(h.state, s+".sock")
	if served := h.named(s); served != nil {
		address = served.Socket
	}
	keys := []string{"proxy_plugins", s}
	add := []string{header(keys...), `type = "snapshot"`, fmt.Sprintf("address = %q", address)}
	p := c.set.table(keys...)
	if p == nil {
		return []Finding{{Severity: Error, What: fmt.Sprintf("containerd does not know the snapshotter %q", s), File: c.main, Add: add}}
	}
	var out []Finding
	if kind := textOr(p["type"], ""); kind != "snapshot" {
		out = append(out, Finding{Severity: Error, What: fmt.Sprintf("the proxy plugin %q has the type %q", s, kind), File: c.place(keys...), Add: add[:2]})
	}
	if at := c.address(s); at != address {
		out = append(out, Finding{Severity: Error, File: c.place(keys...), Add: []string{add[0], add[2]},
			What: fmt.Sprintf("the proxy plugin %q has the address %q; tatami-host serves it at %s", s, at, address)})
	}
	export := append(keys, "exports", "enable_remote_snapshot_annotations")
	if c.version.atLeast(2, 1) && c.set.text(export...) != "true" { // core/transfer/local/pull.go
		out = append(out, Finding{Severity: Warning, File: c.place(keys...), Add: lines(export, "true"),
			What: "pulls by the transfer service (`ctr image pull`) give no labels: they are not lazy"})
	}
	return out
}

func notServed(h *host, s string) Finding {
	mode := modeGuest
	for _, m := range modes {
		if strings.HasSuffix(s, "-"+m) {
			mode = m
		}
	}
	return Finding{Severity: Error, File: h.File, What: fmt.Sprintf("tatami-host does not serve the snapshotter %q", s),
		Add: []string{"[[snapshotter]]", fmt.Sprintf("name = %q", s), fmt.Sprintf("mode = %q", mode)}}
}

// checkMode says whether the handler can take what the snapshotter returns.
func (c *containerd) checkMode(s *Snapshotter, k *kata) []Finding {
	out := c.canServe(s.Mode, k)
	for _, f := range s.Fallback {
		for _, why := range c.canServe(f, k) {
			if why.Severity != Error {
				continue
			}
			out = append(out, Finding{Severity: Warning, What: fmt.Sprintf(
				"images that need the fallback %q of %q do not start with this handler: %s", f, s.Name, why.What)})
			break
		}
	}
	return out
}

// canServe says what stands against a mode. k is nil for other runtimes than Kata.
func (c *containerd) canServe(mode string, k *kata) []Finding {
	var out []Finding
	// The mount manager, which hands mounts to a shim unmounted
	// (core/runtime/v2/task_manager.go, allowedMounts).
	if mode == modeBlock && !c.version.atLeast(2, 2) {
		out = append(out, Finding{Severity: Error, What: fmt.Sprintf("mode block needs containerd 2.2; this is %s", c.version)})
	}
	if k != nil {
		return append(out, k.canServe(mode)...)
	}
	if mode == modeGuest || mode == modeBlock || mode == modeNydus {
		out = append(out, Finding{Severity: Error, What: fmt.Sprintf("mode %s needs Kata Containers; this runtime mounts on the node and can use share", mode)})
	}
	return out
}
