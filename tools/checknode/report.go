package checknode

import (
	"context"
	"fmt"
	"path"
	"slices"

	"github.com/containerd/errdefs"
)

// Options say what is inspected. The zero value is this machine.
type Options struct {
	// Root holds the node's file system. Where it is not "" or "/", the node is
	// not running: sockets and programs are not asked.
	Root string
	// Containerd is containerd's main configuration file in the node.
	Containerd string
	// Host is tatami-host's settings file in the node.
	Host string
	// Version is that of containerd, as "1.7.27"; asked of the program when empty.
	Version string
}

// Default places of a node's files.
const (
	ContainerdFile = "/etc/containerd/config.toml"
	HostFile       = "/etc/tatami/host.toml"
)

// Severity of a finding.
type Severity string

// A handler with an Error does not work; a Warning hurts in some cases; a Note
// is to be known.
const (
	Error   Severity = "error"
	Warning Severity = "warning"
	Note    Severity = "note"
)

// Finding is one thing that is missing, wrong or worth knowing.
type Finding struct {
	Severity Severity `json:"severity"`
	// What is wrong, and why it matters.
	What string `json:"what"`
	// File is where to mend it, if that is a file.
	File string `json:"file,omitempty"`
	// Add are the lines to add there, or to put in place of the key's present one.
	Add []string `json:"add,omitempty"`
}

// Report is what is known of a node.
type Report struct {
	Containerd Containerd `json:"containerd"`
	Host       Host       `json:"tatami_host"`
	Kernel     string     `json:"kernel,omitempty"`
	// Findings about the node as a whole. Errors among them stop every handler.
	Findings []Finding `json:"findings"`
	Handlers []Handler `json:"handlers"`
	// Works says that at least one handler uses Tatami and that all of those work.
	Works bool `json:"works"`
}

// Containerd is the daemon and its effective configuration.
type Containerd struct {
	Version string `json:"version,omitempty"`
	// Assumed says that Version follows from the configuration's schema.
	Assumed bool `json:"version_assumed,omitempty"`
	Schema  int  `json:"schema"`
	// Files in the order in which they are merged.
	Files []string `json:"files"`
}

// Host is tatami-host's settings, as far as they matter here.
type Host struct {
	File         string        `json:"file"`
	Snapshotters []Snapshotter `json:"snapshotters"`
}

// Snapshotter is one that tatami-host serves.
type Snapshotter struct {
	Name     string   `json:"name"`
	Mode     string   `json:"mode"`
	Fallback []string `json:"fallback"`
	Socket   string   `json:"socket"`
}

// Handler is a runtime of containerd; a RuntimeClass names one.
type Handler struct {
	Name string `json:"name"`
	// Runtime is "runtime-rs, qemu", "go, qemu" or the runtime's type.
	Runtime string `json:"runtime"`
	// Config are the files of Kata's configuration, in the order of merging.
	Config      []string `json:"config,omitempty"`
	Snapshotter string   `json:"snapshotter"`
	// Mode is empty for a handler that does not use Tatami.
	Mode     string    `json:"mode,omitempty"`
	Works    bool      `json:"works"`
	Findings []Finding `json:"findings"`
}

// node is the machine that is inspected.
type node struct {
	files  tree
	system system // nil for one that does not run
	opts   Options
}

// Check inspects a node. Its error says that there was nothing to inspect; what
// is wrong with the node is in the report.
func Check(ctx context.Context, o Options) (*Report, error) {
	if o.Containerd == "" {
		o.Containerd = ContainerdFile
	}
	if o.Host == "" {
		o.Host = HostFile
	}
	for _, p := range []string{o.Containerd, o.Host} {
		if !path.IsAbs(p) {
			return nil, fmt.Errorf("file %q: give an absolute path in the node: %w", p, errdefs.ErrInvalidArgument)
		}
	}
	if o.Version != "" {
		if _, err := parseVersion(o.Version); err != nil {
			return nil, err
		}
	}
	files, err := openTree(o.Root)
	if err != nil {
		return nil, err
	}
	n := &node{files: files, opts: o}
	if o.Root == "" || o.Root == "/" {
		n.system = running{}
	}
	return n.check(ctx), nil
}

func (n *node) check(ctx context.Context) *Report {
	r := &Report{Findings: []Finding{}, Handlers: []Handler{}}
	version, findings := n.version(ctx)
	r.add(findings...)
	cfg, findings := loadContainerd(n.files, n.opts.Containerd, version)
	r.add(findings...)
	r.Containerd = Containerd{Version: cfg.version.String(), Assumed: cfg.assumed, Schema: cfg.schema, Files: cfg.set.files}
	host, findings := loadHost(n.files, n.opts.Host)
	r.add(findings...)
	r.Host = host.Host
	for _, h := range cfg.handlers {
		r.Handlers = append(r.Handlers, n.handler(cfg, host, h))
	}
	r.add(host.checkState(cfg, r.Handlers)...)
	r.add(n.sockets(ctx, cfg, host, r.Handlers)...)
	r.Kernel, findings = n.kernel(host, r.Handlers)
	r.add(findings...)
	r.conclude()
	return r
}

func (r *Report) add(f ...Finding) { r.Findings = append(r.Findings, f...) }

// conclude says what works.
func (r *Report) conclude() {
	broken, uses := failed(r.Findings), false
	for i := range r.Handlers {
		h := &r.Handlers[i]
		h.Works = h.Mode != "" && !failed(h.Findings)
		uses = uses || h.Mode != ""
		broken = broken || h.Mode != "" && !h.Works
	}
	if !uses {
		r.add(Finding{Severity: Error, What: "no handler of containerd uses a snapshotter of Tatami"})
	}
	r.Works = uses && !broken
}

func failed(list []Finding) bool {
	return slices.ContainsFunc(list, func(f Finding) bool { return f.Severity == Error })
}
