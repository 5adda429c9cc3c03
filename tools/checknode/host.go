package checknode

import (
	"cmp"
	"fmt"
	"path"
	"slices"
	"strings"
)

// Defaults of tatami-host's settings.
const (
	hostRoot  = "/var/lib/tatami"
	hostState = "/run/tatami-host"
)

// containerdState is the default of both containerd and tatami-host
// (defaults/defaults_unix.go).
const containerdState = "/run/containerd"

// modes of delivery.
const (
	modeGuest = "guest"
	modeBlock = "block"
	modeShare = "share"
	modeNydus = "nydus"
	modeFull  = "full"
)

var modes = []string{modeGuest, modeBlock, modeShare, modeNydus, modeFull}

// host is tatami-host's settings.
type host struct {
	Host
	state   string
	control string // its control socket
	tasks   string // where it looks for containerd's state
	helper  string // what containerd runs to mount images of mode guest
	found   bool
}

// loadHost reads the settings leniently: tatami-host itself refuses what it does
// not know.
func loadHost(t tree, file string) (*host, []Finding) {
	h := &host{Host: Host{File: file, Snapshotters: []Snapshotter{}}, state: hostState, control: path.Join(hostRoot, "tatami-host.sock"), helper: helper}
	root, err := t.parse(file)
	if err != nil {
		return h, []Finding{{Severity: Error, What: "the settings of tatami-host cannot be read: " + err.Error(), File: file, Add: []string{"version = 1"}}}
	}
	h.found = true
	h.state = textOr(root["state"], hostState)
	h.control = textOr(root["socket"], path.Join(textOr(root["root"], hostRoot), "tatami-host.sock"))
	h.tasks = textOr(asTable(root["kata"])["containerd_state"], containerdState)
	h.helper = textOr(root["mount_helper"], helper)
	var findings []Finding
	list, _ := root["snapshotter"].([]any)
	for _, v := range list {
		s := h.snapshotter(asTable(v))
		h.Snapshotters = append(h.Snapshotters, s)
		findings = append(findings, s.check(file)...)
	}
	return h, append(findings, discover(file, root)...)
}

func (h *host) snapshotter(t table) Snapshotter {
	name := textOr(t["name"], "")
	return Snapshotter{
		Name: name, Mode: textOr(t["mode"], ""), Fallback: texts(t["fallback"]),
		Socket: textOr(t["socket"], path.Join(h.state, name+".sock")),
	}
}

func (s Snapshotter) check(file string) []Finding {
	var out []Finding
	if !slices.Contains(modes, s.Mode) {
		out = append(out, Finding{Severity: Error, File: file, Add: []string{`mode = "guest"`},
			What: fmt.Sprintf("snapshotter %q has the mode %q; there are %s", s.Name, s.Mode, strings.Join(modes, ", "))})
	}
	for _, f := range s.Fallback {
		if !slices.Contains(modes, f) {
			out = append(out, Finding{Severity: Error, File: file, Add: []string{`fallback = ["share", "full"]`},
				What: fmt.Sprintf("snapshotter %q falls back to %q; there are %s", s.Name, f, strings.Join(modes, ", "))})
		}
	}
	return out
}

// discover warns of guests that no node would serve.
func discover(file string, root table) []Finding {
	if on, _ := asTable(root["kata"])["discover"].(bool); on {
		return nil
	}
	return []Finding{{Severity: Warning, File: file, Add: []string{"[kata]", "discover = true"},
		What: "tatami-host does not look for Kata's sandboxes: guests fetch from the registry, each for itself"}}
}

// checkState compares where containerd keeps its tasks with where tatami-host
// looks for them to tell whose a container is.
func (h *host) checkState(c *containerd, handlers []Handler) []Finding {
	state := textOr(c.set.value("state"), containerdState)
	guest := slices.ContainsFunc(handlers, func(x Handler) bool { return x.Mode == modeGuest })
	if !guest || !h.found || path.Clean(state) == path.Clean(h.tasks) {
		return nil
	}
	return []Finding{{Severity: Error, File: h.File, Add: []string{"[kata]", fmt.Sprintf("containerd_state = %q", state)},
		What: fmt.Sprintf("containerd keeps its state in %s, but tatami-host looks in %s and would serve no container", state, h.tasks)}}
}

// named is the snapshotter of a name, or nil.
func (h *host) named(name string) *Snapshotter {
	for i := range h.Snapshotters {
		if h.Snapshotters[i].Name == name {
			return &h.Snapshotters[i]
		}
	}
	return nil
}

// ours says that a snapshotter of containerd is meant to be Tatami's: tatami-host
// serves it, its socket lies with those of tatami-host, or it is called so.
func (h *host) ours(name, address string) bool {
	return h.named(name) != nil || strings.HasPrefix(address, h.state+"/") ||
		name == "tatami" || strings.HasPrefix(name, "tatami-")
}

// textOr is v, or or where it is no text.
func textOr(v any, or string) string {
	s, _ := v.(string)
	return cmp.Or(s, or)
}
