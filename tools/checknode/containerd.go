package checknode

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"path"
	"regexp"
	"slices"
	"strings"
)

// Names of containerd's CRI plugins: schema 2 has one, schema 3 and later two
// (docs/cri/config.md).
const (
	criPlugin     = "io.containerd.grpc.v1.cri"
	runtimePlugin = "io.containerd.cri.v1.runtime"
	imagesPlugin  = "io.containerd.cri.v1.images"
)

// maxImports bounds the files of one configuration.
const maxImports = 128

// containerd is the effective configuration.
type containerd struct {
	version version
	assumed bool
	schema  int // of the main file
	main    string
	set     *settings
	// split says that there are the two plugins of containerd 2.x; tables of the
	// single one have then been moved, as containerd does.
	split    bool
	handlers []string // sorted
}

// loadContainerd reads the main file and its imports, and merges them as that
// version of containerd does. What is wrong is among the findings.
func loadContainerd(t tree, file string, v version) (*containerd, []Finding) {
	c := &containerd{version: v, main: file, set: newSettings()}
	main, err := t.parse(file)
	if err != nil {
		return c, []Finding{{Severity: Error, What: "containerd's configuration cannot be read: " + err.Error(), File: file,
			Add: []string{"version = 3"}}}
	}
	c.schema = schemaOf(main)
	if c.version.zero() {
		c.version, c.assumed = assume(c.schema), true
	}
	c.split = c.version.atLeast(2, 0)
	findings := c.load(t, main)
	findings = append(findings, c.checkSchema()...)
	c.addDefault()
	c.handlers = slices.Sorted(maps.Keys(c.set.table(c.runtimes()...)))
	findings = append(findings, c.checkDefault()...)
	return c, append(findings, c.checkDisabled()...)
}

// load merges the main file and what it imports. A file that several import is
// read once, as containerd has it against circles.
func (c *containerd) load(t tree, main table) []Finding {
	var findings []Finding
	done := map[string]bool{}
	pending := []string{c.main}
	for len(pending) > 0 {
		file := pending[0]
		pending = pending[1:]
		if done[file] {
			continue
		}
		if done[file] = true; len(done) > maxImports {
			return append(findings, Finding{Severity: Error, What: fmt.Sprintf("more than %d files are imported; the rest was not read", maxImports), File: c.main})
		}
		one := main
		if file != c.main {
			var err error
			if one, err = t.parse(file); err != nil {
				findings = append(findings, Finding{Severity: Error, What: "containerd does not start: an imported file cannot be read: " + err.Error(), File: file})
				continue
			}
		}
		c.merge(file, one)
		more, err := imports(t, file, texts(one["imports"]))
		if err != nil {
			findings = append(findings, Finding{Severity: Error, What: err.Error(), File: file})
		}
		pending = append(pending, more...)
	}
	return findings
}

// imports expands the imports of a file: patterns, and paths from its directory
// (cmd/containerd/server/config/config.go, resolveImports).
func imports(t tree, file string, list []string) ([]string, error) {
	var out []string
	for _, p := range list {
		if !path.IsAbs(p) {
			p = path.Join(path.Dir(file), p)
		}
		p = path.Clean(p)
		if !strings.Contains(p, "*") {
			out = append(out, p)
			continue
		}
		found, err := t.glob(p)
		if err != nil {
			return out, err
		}
		out = append(out, found...)
		if len(out) > maxImports {
			return out[:maxImports], nil
		}
	}
	return out, nil
}

// merge puts one file over those before it. containerd 2.x merges plugins'
// tables; 1.x replaces a plugin's table whole. Both replace a proxy plugin's
// (mergeConfig of either).
func (c *containerd) merge(file string, t table) {
	for name := range asTable(t["proxy_plugins"]) {
		c.set.drop("proxy_plugins", name)
	}
	plugins := asTable(t["plugins"])
	if schemaOf(t) < 2 && plugins["cri"] != nil { // v1MigratePluginName
		plugins[criPlugin] = plugins["cri"]
		delete(plugins, "cri")
	}
	if c.split {
		splitPlugins(plugins)
	} else {
		for name := range plugins {
			c.set.drop("plugins", name)
		}
	}
	c.set.merge(file, t)
}

// splitPlugins moves the tables of schema 2 to where containerd 2.x has them
// (ConfigMigration of plugins/cri/images and plugins/cri/runtime). A handler's
// snapshotter does not become that of its pulls: containerd looks for another
// key there, in every version from 2.0 to 2.4.
func splitPlugins(plugins table) {
	cri := asTable(asTable(plugins[criPlugin])["containerd"])
	if cri == nil {
		return
	}
	images, runtime := subtable(plugins, imagesPlugin), subtable(subtable(plugins, runtimePlugin), "containerd")
	for k, v := range cri {
		switch k {
		case "snapshotter", "disable_snapshot_annotations", "discard_unpacked_layers":
			images[k] = v
		default:
			runtime[k] = v
		}
	}
	delete(plugins, criPlugin)
}

// addDefault adds the handler that containerd has by itself
// (DefaultRuntimeConfig of internal/cri/config/config_unix.go). In containerd 1.x
// a table of handlers in a file replaces it.
func (c *containerd) addDefault() {
	keys := append(c.runtimes(), builtin)
	there := c.set.table(c.runtimes()...)
	if there[builtin] != nil || !c.split && there != nil {
		return
	}
	t := c.set.root
	for _, k := range keys {
		t = subtable(t, k)
	}
	t["runtime_type"] = "io.containerd.runc.v2"
}

// builtin is containerd's handler for pods without a RuntimeClass, where
// default_runtime_name does not name another.
const builtin = "runc"

// checkDefault looks for the handler of pods without a RuntimeClass.
func (c *containerd) checkDefault() []Finding {
	at := c.runtimes()
	name := textOr(c.set.value(append(at[:len(at)-1:len(at)-1], "default_runtime_name")...), builtin)
	keys := append(at, name)
	if c.set.table(keys...) != nil {
		return nil
	}
	return []Finding{{Severity: Error, File: c.place(at...), Add: []string{header(keys...), `runtime_type = "io.containerd.runc.v2"`},
		What: fmt.Sprintf("pods without a RuntimeClass have no handler: the handlers in this file replace the built-in %q", name)}}
}

func asTable(v any) table {
	t, _ := v.(table)
	return t
}

// subtable returns t[k], made when it is no table.
func subtable(t table, k string) table {
	sub, ok := t[k].(table)
	if !ok {
		sub = table{}
		t[k] = sub
	}
	return sub
}

func schemaOf(t table) int {
	v, _ := t["version"].(int64)
	return int(max(1, min(v, 1<<20)))
}

// runtimes is the key of the handlers' table.
func (c *containerd) runtimes() []string {
	if c.split {
		return []string{"plugins", runtimePlugin, "containerd", "runtimes"}
	}
	return []string{"plugins", criPlugin, "containerd", "runtimes"}
}

// images is the key of the table about pulls.
func (c *containerd) images() []string {
	if c.split {
		return []string{"plugins", imagesPlugin}
	}
	return []string{"plugins", criPlugin, "containerd"}
}

// place is the file where a key is, or where it can be added: containerd 1.x
// looks for it only in the file that has the plugin's table last.
func (c *containerd) place(keys ...string) string {
	for !c.split && len(keys) > 2 && c.set.file(keys...) == "" {
		keys = keys[:len(keys)-1]
	}
	if f := c.set.file(keys...); f != "" {
		return f
	}
	return c.main
}

// header is a table's line in a file.
func header(keys ...string) string {
	quoted := make([]string, len(keys))
	for i, k := range keys {
		quoted[i] = k
		if !bare.MatchString(k) {
			quoted[i] = fmt.Sprintf("%q", k)
		}
	}
	return "[" + strings.Join(quoted, ".") + "]"
}

// bare matches a key that needs no quotes (TOML 1.0, Keys).
var bare = regexp.MustCompile(`^[A-Za-z0-9_-]+$`)

// checkSchema says what a schema means for this version of containerd.
func (c *containerd) checkSchema() []Finding {
	newest := 2
	switch {
	case c.version.atLeast(2, 3):
		newest = 4
	case c.split:
		newest = 3
	}
	if c.schema > newest {
		return []Finding{{Severity: Error, File: c.main, Add: []string{fmt.Sprintf("version = %d", newest)},
			What: fmt.Sprintf("containerd %s does not start with a configuration of version %d", c.version, c.schema)}}
	}
	return nil
}

// checkDisabled looks for the CRI plugin in disabled_plugins; Docker's packages
// of containerd put it there.
func (c *containerd) checkDisabled() []Finding {
	for _, p := range texts(c.set.root["disabled_plugins"]) {
		if p == "cri" || p == criPlugin || p == runtimePlugin || p == imagesPlugin {
			return []Finding{{Severity: Error, File: c.set.file("disabled_plugins"), Add: []string{"disabled_plugins = []"},
				What: fmt.Sprintf("the plugin %q is disabled: kubelet has no runtime", p)}}
		}
	}
	return nil
}

// notThere says that a file is missing, and nothing worse.
func notThere(err error) bool { return errors.Is(err, fs.ErrNotExist) }
