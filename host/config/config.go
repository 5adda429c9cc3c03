// Package config holds the settings of tatami-host: defaults in the code, then
// a TOML file, then flags. It reads one file and starts nothing.
package config

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/pelletier/go-toml/v2"

	"github.com/tatami-containers/tatami/protocols/vsock"
)

// Path is where the file is looked for when --config is not given. It may be
// absent.
const Path = "/etc/tatami/host.toml"

// Version of the file's schema that this program reads.
const Version = 1

// maxFile bounds the settings file in bytes.
const maxFile = 1 << 20

// maxUnixPath is the longest path that fits in a unix socket address
// (sun_path, unix(7)), the terminating zero left out.
const maxUnixPath = 107

// Config is every setting of tatami-host.
type Config struct {
	Version int `toml:"version"`
	// Root is the directory that holds everything the node keeps.
	Root string `toml:"root"`
	// Socket is the control socket; tatami-host.sock in Root when empty.
	Socket string `toml:"socket"`
	// ImagesSocket is where virtio-fs devices get images; images.sock in Root when
	// empty.
	ImagesSocket string `toml:"images_socket"`
	// State is the directory of mounts, of the sockets of snapshotters, and of
	// what describes them. It should be on a tmpfs.
	State string `toml:"state"`
	// MountHelper is the program that containerd runs to mount images of mode
	// guest on the node.
	MountHelper string `toml:"mount_helper"`
	// IdleExit ends the program when the last control connection has closed:
	// who attaches sandboxes stays connected as long as they live.
	IdleExit bool `toml:"idle_exit"`
	// Class is that of containers of which nothing says it.
	Class    string   `toml:"class"`
	Log      Log      `toml:"log"`
	Registry Registry `toml:"registry"`
	Store    Store    `toml:"store"`
	Relay    Relay    `toml:"relay"`
	Mirror   Mirror   `toml:"mirror"`
	Kata     Kata     `toml:"kata"`
	CRI      CRI      `toml:"cri"`
	Schedule Schedule `toml:"schedule"`
	// Classes of workload, by name.
	Classes map[string]Class `toml:"classes"`
	Metrics Metrics          `toml:"metrics"`
	Profile Profile          `toml:"profile"`
	// Check ends the program when the settings are read; a flag only.
	Check bool `toml:"-"`
	// Snapshotters are what containerd finds here; none for a program that only
	// serves sandboxes which are attached to it.
	Snapshotters []Snapshotter `toml:"snapshotter"`
}

// Log says what is logged.
type Log struct {
	// Level is "debug", "info", "warn" or "error".
	Level string `toml:"level"`
	// Format is "json" or "text".
	Format string `toml:"format"`
}

// Registry says how images are fetched.
type Registry struct {
	// PlainHTTP names the hosts ("host" or "host:port") that are asked without
	// TLS, beside those of the machine itself.
	PlainHTTP []string `toml:"plain_http"`
	// ConfigPath lists directories of hosts.toml files, separated by ":", which
	// say where the images of a registry are asked for. They need not exist.
	ConfigPath string `toml:"config_path"`
	// Credentials lists places of credentials, separated by ":", of which the
	// first that has some counts: a file in the form of Docker's config.json, a
	// directory of pull secrets, the kubelet's CredentialProviderConfig, or a
	// kubeconfig.
	// Anonymous when empty.
	Credentials string `toml:"credentials"`
	// ProviderBinDir has the programs of a CredentialProviderConfig.
	ProviderBinDir string `toml:"credential_provider_bin_dir"`
	// Layers is how many layers the node fetches and unpacks at a time.
	Layers int `toml:"layers"`
	// Ranges is how many parts of one layer are fetched at a time at most: as many
	// as make it faster.
	Ranges int `toml:"ranges"`
}

// Relay bounds what one sandbox may take.
type Relay struct {
	// Requests is how many requests of a sandbox are served at a time; others
	// wait. So many are those of its virtio-fs device, too.
	Requests int `toml:"requests"`
	// Stall is how long a sandbox may take no byte of an answer before its
	// connection is closed.
	Stall Duration `toml:"stall"`
}

// Mirror is a registry for the programs of the node itself.
type Mirror struct {
	// Address is where it listens: a loopback address with a port. It is off when
	// empty.
	Address string `toml:"address"`
	// Blobs is the room on the disk for compressed blobs that the mirror and the
	// relays pass on, at most an eighth of Store.Size; "0" keeps none.
	Blobs Size `toml:"blobs"`
}

// Kata says how the sandboxes of Kata Containers are found.
type Kata struct {
	// Discover attaches sandboxes by themselves; without it, somebody has to
	// say each on the control socket.
	Discover bool `toml:"discover"`
	// RunDirs are the directories in which Kata's shims have theirs. They need
	// not exist.
	RunDirs []string `toml:"run_dirs"`
	// HostPort and RelayPort are the vsock ports at which guests expect the
	// Host service and the relay.
	HostPort  uint32 `toml:"host_port"`
	RelayPort uint32 `toml:"relay_port"`
	// ContainerdState is containerd's state directory: there it is looked up
	// whose a container is.
	ContainerdState string `toml:"containerd_state"`
}

// CRI is what the kubelet is shown.
type CRI struct {
	// ImageService is a socket on which containerd's image service is passed on to
	// the kubelet, to see the credentials of pulls; none when empty. containerd is
	// at containerd.sock in Kata.ContainerdState.
	ImageService string `toml:"image_service"`
}

// Duration is a time.Duration that is written "30s" in a file.
type Duration time.Duration

// UnmarshalText reads a duration as time.ParseDuration does.
func (d *Duration) UnmarshalText(text []byte) error {
	v, err := time.ParseDuration(string(text))
	*d = Duration(v)
	return err
}

// MarshalText writes a duration as UnmarshalText reads it.
func (d Duration) MarshalText() ([]byte, error) {
	return []byte(time.Duration(d).String()), nil
}

// Default returns the settings of a machine without a file.
func Default() Config {
	return Config{
		Version:     Version,
		Root:        "/var/lib/tatami",
		State:       "/run/tatami-host",
		MountHelper: "/opt/tatami/bin/nydus-overlayfs-tatami",
		Class:       "online",
		Log:         Log{Level: "info", Format: "json"},
		Registry:    Registry{ConfigPath: "/etc/containerd/certs.d:/etc/docker/certs.d", Layers: 8, Ranges: 4},
		Store:       Store{Size: "75%", High: 95, Low: 85},
		Relay:       Relay{Requests: 16, Stall: Duration(30 * time.Second)},
		Mirror:      Mirror{Blobs: 10 << 30},
		Kata: Kata{
			RunDirs: []string{"/run/kata", "/run/vc/sbs"}, HostPort: vsock.HostPort, RelayPort: vsock.RelayPort,
			ContainerdState: "/run/containerd",
		},
		Schedule: Schedule{Enabled: true}, Classes: defaultClasses(),
		Profile: Profile{Record: Duration(30 * time.Second), Budget: 64 << 20},
	}
}

// Decode reads a settings file's text over the defaults. Unknown keys are
// refused with their names and lines.
func Decode(text []byte) (Config, error) {
	c := Default()
	c.Version = 0
	d := toml.NewDecoder(bytes.NewReader(text)).DisallowUnknownFields()
	if err := d.Decode(&c); err != nil {
		return Config{}, explain(err)
	}
	if c.Version != Version {
		return Config{}, fmt.Errorf("version is %d: write version = %d", c.Version, Version)
	}
	return c, nil
}

// explain turns a decoder's error into one line that names keys and lines.
func explain(err error) error {
	var missing *toml.StrictMissingError
	if errors.As(err, &missing) {
		var keys []string
		for _, e := range missing.Errors {
			row, _ := e.Position()
			keys = append(keys, fmt.Sprintf("%s (line %d)", strings.Join(e.Key(), "."), row))
		}
		return fmt.Errorf("unknown key %s: remove it or correct its name", strings.Join(keys, ", "))
	}
	var de *toml.DecodeError
	if errors.As(err, &de) {
		row, column := de.Position()
		return fmt.Errorf("line %d, column %d: %s", row, column, strings.TrimPrefix(de.Error(), "toml: "))
	}
	return err
}

// load reads the file at path; without one it returns the defaults where
// optional is set.
func load(path string, optional bool) (Config, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) && optional {
		return Default(), nil
	}
	if err != nil {
		return Config{}, fmt.Errorf("open settings: %w", err)
	}
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return Config{}, fmt.Errorf("read settings %s: %w", path, err)
	}
	if len(text) > maxFile {
		return Config{}, fmt.Errorf("read settings %s: longer than %d bytes", path, maxFile)
	}
	c, err := Decode(text)
	if err != nil {
		return Config{}, fmt.Errorf("read settings %s: %w", path, err)
	}
	return c, nil
}

// check completes the settings and says what is wrong with them.
func (c *Config) check() error {
	if !filepath.IsAbs(c.Root) {
		return fmt.Errorf("root %q: give an absolute path", c.Root)
	}
	c.Root = filepath.Clean(c.Root)
	if c.Socket == "" {
		c.Socket = filepath.Join(c.Root, "tatami-host.sock")
	}
	if c.ImagesSocket == "" {
		c.ImagesSocket = filepath.Join(c.Root, "images.sock")
	}
	if err := c.checkSockets(); err != nil {
		return err
	}
	if err := c.checkNumbers(); err != nil {
		return err
	}
	if err := c.Store.check(); err != nil {
		return err
	}
	if err := c.checkSnapshotters(); err != nil {
		return err
	}
	if err := c.checkCRI(); err != nil {
		return err
	}
	if c.IdleExit && c.Kata.Discover {
		return errors.New("idle_exit and kata.discover are both set: sandboxes that are found need a program that stays")
	}
	if err := c.Kata.check(); err != nil {
		return err
	}
	for _, check := range []func() error{c.Mirror.check, c.Metrics.check, c.checkClasses, c.Profile.check} {
		if err := check(); err != nil {
			return err
		}
	}
	return c.checkNames()
}

func (c *Config) checkSockets() error {
	for _, s := range []struct{ key, path string }{{"socket", c.Socket}, {"images_socket", c.ImagesSocket}} {
		if !filepath.IsAbs(s.path) || len(s.path) > maxUnixPath {
			return fmt.Errorf("%s %q: give an absolute path of at most %d bytes", s.key, s.path, maxUnixPath)
		}
	}
	if filepath.Clean(c.Socket) == filepath.Clean(c.ImagesSocket) {
		return fmt.Errorf("socket and images_socket are both %q: give two paths", c.Socket)
	}
	return nil
}

// checkCRI needs the sockets of snapshotters.
func (c *Config) checkCRI() error {
	path := c.CRI.ImageService
	if path == "" {
		return nil
	}
	if !filepath.IsAbs(path) || len(path) > maxUnixPath {
		return fmt.Errorf("cri.image_service %q: give an absolute path of at most %d bytes", path, maxUnixPath)
	}
	c.CRI.ImageService = filepath.Clean(path)
	if len(c.Snapshotters) == 0 {
		return errors.New("cri.image_service is set, but no snapshotter: containerd would not use the credentials")
	}
	others := []string{c.Socket, c.ImagesSocket, c.Kata.ContainerdSocket()}
	for _, s := range c.Snapshotters {
		others = append(others, s.Socket)
	}
	for _, other := range others {
		if filepath.Clean(other) == c.CRI.ImageService {
			return fmt.Errorf("cri.image_service %q is another socket already: give a path of its own", path)
		}
	}
	return nil
}

// ContainerdSocket is where containerd and the distributions of Kubernetes that bring
// their own have its API.
func (k *Kata) ContainerdSocket() string { return filepath.Join(k.ContainerdState, "containerd.sock") }

func (c *Config) checkNumbers() error {
	for _, n := range []struct {
		key       string
		value, to int
	}{
		{"registry.layers", c.Registry.Layers, 64},
		{"registry.ranges", c.Registry.Ranges, 64},
		{"relay.requests", c.Relay.Requests, 1024},
	} {
		if n.value < 1 || n.value > n.to {
			return fmt.Errorf("%s is %d: give 1 to %d", n.key, n.value, n.to)
		}
	}
	if s := time.Duration(c.Relay.Stall); s < time.Second || s > time.Hour {
		return fmt.Errorf("relay.stall is %s: give 1s to 1h", s)
	}
	return nil
}

func (c *Config) checkNames() error {
	if c.Log.Format != "json" && c.Log.Format != "text" {
		return fmt.Errorf("log.format %q: give json or text", c.Log.Format)
	}
	if _, err := c.Log.level(); err != nil {
		return fmt.Errorf("log.level %q: give debug, info, warn or error", c.Log.Level)
	}
	for _, h := range c.Registry.PlainHTTP {
		if h == "" || strings.ContainsAny(h, "/ ") {
			return fmt.Errorf("registry.plain_http %q: give host or host:port", h)
		}
	}
	return c.Registry.checkPaths()
}

func (r *Registry) checkPaths() error {
	for _, p := range []struct{ key, list string }{
		{"config_path", r.ConfigPath}, {"credentials", r.Credentials}, {"credential_provider_bin_dir", r.ProviderBinDir},
	} {
		for _, path := range filepath.SplitList(p.list) {
			if !filepath.IsAbs(path) {
				return fmt.Errorf("registry.%s %q: give absolute paths", p.key, path)
			}
		}
	}
	return nil
}

// check refuses addresses that others than this node could reach: the mirror has no
// TLS, and callers send it their logins.
func (m Mirror) check() error {
	if m.Address == "" {
		return nil
	}
	at, err := netip.ParseAddrPort(m.Address)
	if err != nil || !at.Addr().IsLoopback() || at.Port() == 0 {
		return fmt.Errorf("mirror.address %q: give a loopback address and a port, as \"127.0.0.1:5055\"", m.Address)
	}
	return nil
}

// maxRunDirs bounds the directories that are watched.
const maxRunDirs = 16

func (k *Kata) check() error {
	if k.Discover && (len(k.RunDirs) == 0 || len(k.RunDirs) > maxRunDirs) {
		return fmt.Errorf("kata.run_dirs has %d directories: give 1 to %d", len(k.RunDirs), maxRunDirs)
	}
	for i, dir := range k.RunDirs {
		if !filepath.IsAbs(dir) {
			return fmt.Errorf("kata.run_dirs %q: give an absolute path", dir)
		}
		k.RunDirs[i] = filepath.Clean(dir)
		if slices.Contains(k.RunDirs[:i], k.RunDirs[i]) {
			return fmt.Errorf("kata.run_dirs %q: it is there twice", dir)
		}
	}
	if !filepath.IsAbs(k.ContainerdState) {
		return fmt.Errorf("kata.containerd_state %q: give an absolute path", k.ContainerdState)
	}
	return k.checkPorts()
}

// Ports of guest and host in use: the agent's of Kata are 1024 to 1027
// (kata-types src/config/default.rs), and 4294967295 is any port.
const (
	minPort = 1028
	maxPort = 1<<32 - 2
)

func (k *Kata) checkPorts() error {
	for _, p := range []struct {
		key   string
		value uint32
	}{{"kata.host_port", k.HostPort}, {"kata.relay_port", k.RelayPort}} {
		if p.value < minPort || p.value > maxPort {
			return fmt.Errorf("%s is %d: give %d to %d", p.key, p.value, minPort, uint32(maxPort))
		}
	}
	if k.HostPort == k.RelayPort {
		return fmt.Errorf("kata.host_port and kata.relay_port are both %d: give two ports", k.HostPort)
	}
	return nil
}

func (l Log) level() (slog.Level, error) {
	var level slog.Level
	err := level.UnmarshalText([]byte(l.Level))
	return level, err
}

// Logger writes to w as the settings say.
func (l Log) Logger(w io.Writer) *slog.Logger {
	level, err := l.level()
	if err != nil {
		level = slog.LevelInfo
	}
	opts := &slog.HandlerOptions{Level: level}
	if l.Format == "text" {
		return slog.New(slog.NewTextHandler(w, opts))
	}
	return slog.New(slog.NewJSONHandler(w, opts))
}
