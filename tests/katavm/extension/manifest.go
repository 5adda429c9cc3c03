// Package extension reads a mounted guest extension image as kata-agent 4.1.0
// does (src/agent/src/guest_extension_image.rs): what it refuses is refused
// here, what it passes over is passed over.
package extension

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"
)

// Root is where extension images are mounted, one directory each.
const Root = "/run/kata-extensions"

// Components that the agent asks the extension "coco" for.
const (
	OcicryptConfig = "ocicrypt-config"
	PauseBundle    = "pause-bundle"
)

const manifestPath = "etc/kata-extensions/components.toml"

// Extension is a mounted image.
type Extension struct {
	Dir string // its mount point
	m   manifest
}

// manifest is ExtensionManifest. Keys that it does not have are passed over, as
// serde does without deny_unknown_fields.
type manifest struct {
	SchemaVersion *uint32           `toml:"schema_version"`
	Paths         map[string]string `toml:"paths"`
	Process       []process         `toml:"process"`
}

type process struct {
	ID           *string            `toml:"id"`
	Level        uint32             `toml:"level"`
	Path         string             `toml:"path"`
	Select       string             `toml:"select"`
	Variants     map[string]variant `toml:"variants"`
	Args         []string           `toml:"args"`
	OptionalArgs []optionalArgs     `toml:"optional_args"`
	Config       string             `toml:"config"`
	Env          map[string]string  `toml:"env"`
	WaitSocket   string             `toml:"wait_socket"`
	TimeoutSecs  string             `toml:"timeout_secs"`
}

type optionalArgs struct {
	When string   `toml:"when"`
	Args []string `toml:"args"`
}

type variant struct {
	Path string            `toml:"path"`
	Args []string          `toml:"args"`
	Env  map[string]string `toml:"env"`
}

// Process is what is to be launched: LaunchSpec.
type Process struct {
	ID         string
	Path       string
	Args       []string
	Config     string   // passed with -c if the file exists; "" for none
	Env        []string // beside the agent's own
	WaitSocket string   // "" for none
	Timeout    time.Duration
}

// Open reads the manifest of the extension that is mounted at dir. Without the
// directory there is no extension (nil, nil); without a manifest in it, it is
// broken.
func Open(dir string) (*Extension, error) {
	if _, err := os.Stat(dir); errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	data, err := os.ReadFile(filepath.Join(dir, manifestPath))
	if err != nil {
		return nil, fmt.Errorf("extension is mounted at %s without a manifest: %w", dir, err)
	}
	e := &Extension{Dir: dir}
	if err := e.parse(data); err != nil {
		return nil, fmt.Errorf("manifest of the extension at %s: %w", dir, err)
	}
	return e, nil
}

func (e *Extension) parse(data []byte) error {
	if err := toml.Unmarshal(data, &e.m); err != nil {
		return err
	}
	if err := checkCase(data); err != nil {
		return err
	}
	if e.m.SchemaVersion == nil || *e.m.SchemaVersion != 1 {
		return errors.New("schema_version is missing or not 1")
	}
	for _, p := range e.m.Process {
		if p.ID == nil {
			return errors.New("a process has no id")
		}
	}
	return nil
}

// checkCase refuses what go-toml takes for a known key and serde does not:
// upper-case letters.
func checkCase(data []byte) error {
	var raw struct {
		Process []map[string]any `toml:"process"`
	}
	var top map[string]any
	if err := errors.Join(toml.Unmarshal(data, &raw), toml.Unmarshal(data, &top)); err != nil {
		return err
	}
	for _, table := range append(raw.Process, top) {
		for key := range maps.Keys(table) {
			if key != strings.ToLower(key) {
				return fmt.Errorf("key %q", key)
			}
		}
	}
	return nil
}

// Component is the absolute path of an entry of [paths].
func (e *Extension) Component(id string) (string, error) {
	rel, ok := e.m.Paths[id]
	if !ok {
		return "", fmt.Errorf("component %q is not in the manifest", id)
	}
	return e.resolve(rel)
}

// resolve makes a path of the manifest absolute; ".." is refused.
func (e *Extension) resolve(rel string) (string, error) {
	rel = strings.TrimSpace(rel)
	if rel == "" || slices.Contains(strings.Split(rel, "/"), "..") {
		return "", fmt.Errorf("path %q", rel)
	}
	return filepath.Join(e.Dir, rel), nil
}

// Plan is what to launch, in the order of the manifest: processes whose level is
// from 1 to maxLevel. vars are the values of ${…}.
func (e *Extension) Plan(maxLevel uint32, vars map[string]string) ([]Process, error) {
	var plan []Process
	for _, p := range e.m.Process {
		if p.Level == 0 || p.Level > maxLevel {
			continue
		}
		spec, err := e.process(p, vars)
		if err != nil {
			return nil, fmt.Errorf("process %q: %w", *p.ID, err)
		}
		plan = append(plan, spec)
	}
	return plan, nil
}

func (e *Extension) process(p process, vars map[string]string) (Process, error) {
	s := substituter{vars: vars}
	v, err := p.variant(&s)
	if err != nil {
		return Process{}, err
	}
	path := p.Path
	if v.Path != "" {
		path = v.Path
	}
	out := Process{ID: *p.ID, Config: s.one(p.Config), WaitSocket: s.one(p.WaitSocket), Args: s.all(p.Args)}
	for _, o := range p.OptionalArgs {
		if vars[o.When] != "" {
			out.Args = append(out.Args, s.all(o.Args)...)
		}
	}
	out.Args = append(out.Args, s.all(v.Args)...)
	env := maps.Clone(p.Env)
	if env == nil {
		env = map[string]string{}
	}
	maps.Copy(env, v.Env)
	for _, key := range slices.Sorted(maps.Keys(env)) {
		out.Env = append(out.Env, key+"="+s.one(env[key]))
	}
	path, timeout := s.one(path), s.one(p.TimeoutSecs)
	if s.err != nil {
		return Process{}, s.err
	}
	if timeout != "" {
		secs, err := strconv.ParseUint(timeout, 10, 32)
		if err != nil {
			return Process{}, fmt.Errorf("timeout_secs %q", timeout)
		}
		out.Timeout = time.Duration(secs) * time.Second
	}
	out.Path, err = e.resolve(path)
	return out, err
}

// variant chooses among the flavours of a process; there need not be any.
func (p *process) variant(s *substituter) (variant, error) {
	if len(p.Variants) == 0 {
		return variant{}, nil
	}
	name := s.one(p.Select)
	if name == "" {
		name = "default"
	}
	v, ok := p.Variants[name]
	if !ok {
		return variant{}, fmt.Errorf("no variant %q", name)
	}
	return v, nil
}

// substituter replaces ${name}; a name that it does not know is an error, which
// it keeps.
type substituter struct {
	vars map[string]string
	err  error
}

func (s *substituter) one(template string) string {
	var out strings.Builder
	for {
		before, rest, found := strings.Cut(template, "${")
		out.WriteString(before)
		if !found {
			return out.String()
		}
		name, after, closed := strings.Cut(rest, "}")
		value, known := s.vars[name]
		if !closed || !known {
			s.err = errors.Join(s.err, fmt.Errorf("variable in %q is not known or not closed", template))
			return ""
		}
		out.WriteString(value)
		template = after
	}
}

func (s *substituter) all(templates []string) []string {
	var out []string
	for _, t := range templates {
		out = append(out, s.one(t))
	}
	return out
}
