// Package config is the one configuration of tatami-guest. Its values come, the
// later over the earlier, from the defaults below, a TOML file, the table
// [tatami] of a Confidential Data Hub's file, the flags and the kernel command
// line (tatami.<key>=<value>), and are checked once, by Load. Other packages get
// plain values and never see this one.
package config

import (
	"bytes"
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"io/fs"
	"os"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/pelletier/go-toml/v2"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
)

// Version is the only version of the file format.
const Version = 1

// DefaultFile is read when no other file is named; it may be missing.
const DefaultFile = "/etc/tatami/guest.toml"

// InitShare is where init mounts the node's image files.
const InitShare = "/run/tatami/virtiofs"

// cmdlinePrefix marks our words on the kernel command line.
const cmdlinePrefix = "tatami."

// Config holds every setting of the daemon. Addresses have the form of
// package protocols/vsock.
type Config struct {
	Version int `toml:"version"` // of the file; 1

	Listen       []string `toml:"listen"`        // ttrpc: the Guest service, and Runner where it is on
	StreamListen string   `toml:"stream_listen"` // standard streams of containers
	CDHSocket    string   `toml:"cdh_socket"`    // the services that kata-agent calls; "" is off
	CDHForward   string   `toml:"cdh_forward"`   // socket of a real Confidential Data Hub; "" has none
	// CDHForwardConfig is where that one's configuration is written; "" for
	// nowhere. See HubConfig.
	CDHForwardConfig string `toml:"cdh_forward_config"`
	// CDHConfig is the Confidential Data Hub's file that was read; a flag only.
	CDHConfig string `toml:"-"`

	HostAddress  string   `toml:"host_address"`     // ttrpc Host service; "" has none
	RelayAddress string   `toml:"relay_address"`    // the node's registry; "" has none
	Registry     bool     `toml:"registry"`         // ask registries when the node cannot serve
	RegistryAddr string   `toml:"registry_address"` // dialled in place of every registry's own address; "" is off
	PlainHTTP    []string `toml:"plain_http"`       // registry hosts without TLS
	Credentials  []string `toml:"credentials"`      // files for registries; none is Docker's own config.json
	Trust        string   `toml:"trust"`            // the least that an index must be bound by: "host" or "image"
	VirtioFS     string   `toml:"virtiofs"`         // "auto" looks for the node's image files in VirtioFSDirs; "off"
	VirtioFSDirs []string `toml:"virtiofs_dirs"`    // the first that has an image counts
	// Profile has the node told what containers read first, and fetches what the node
	// says that earlier ones read.
	Profile bool `toml:"profile"`
	// Patience is how long reads wait while no source works, before they fail.
	Patience Duration `toml:"patience"`

	StateDir    string `toml:"state_dir"`    // mount table, sockets and work directories
	StoreDir    string `toml:"store_dir"`    // where fetched bytes are kept; "" keeps nothing
	StoreMemory int64  `toml:"store_memory"` // bound of fetched bytes that nobody has read yet
	MountPath   string `toml:"mount_path"`   // "auto", "file" or "loop"

	Runner   bool   `toml:"runner"`  // offer the Runner service
	Runtime  string `toml:"runtime"` // OCI runtime; "" looks for crun, then runc
	Hostname string `toml:"hostname"`
	Net      Net    `toml:"net"`
	LogLevel string `toml:"log_level"` // "debug", "info", "warn" or "error"
}

// Net is the network that init sets up in a virtual machine of ours.
type Net struct {
	Interface string   `toml:"interface"` // "" takes the first that is not the loopback
	Address   string   `toml:"address"`   // with prefix length: "10.0.2.15/24"; "" sets up none
	Gateway   string   `toml:"gateway"`
	DNS       []string `toml:"dns"`
}

// Default returns the settings of a guest in a Kata sandbox.
func Default() Config {
	return Config{
		Version:      Version,
		Listen:       []string{"unix:/run/tatami/guest.sock"}, // nothing of the node's: it could mount over anything
		StreamListen: "vsock:2101",
		CDHSocket:    "/run/confidential-containers/cdh.sock",
		HostAddress:  "vsock:2:2110",
		RelayAddress: "vsock:2:2111",
		Registry:     true,
		Trust:        "host",
		VirtioFS:     "auto",
		VirtioFSDirs: []string{
			// Where kata-agent mounts the file system of the sandbox, from virtiofsd
			// and from nydusd (kata-containers: src/runtime/virtcontainers/
			// kata_agent.go, kataGuestSharedDir and kataGuestNydusRootDir).
			"/run/kata-containers/shared/containers/" + sharedimages.Dir,
			"/run/kata-containers/shared/" + sharedimages.Dir,
			InitShare,
		},
		Profile:     true,
		Patience:    Duration(time.Minute),
		StateDir:    "/run/tatami",
		StoreMemory: 16 << 20,
		MountPath:   "auto",
		Hostname:    "tatami",
		LogLevel:    "info",
	}
}

// setting is one key with where its value goes.
type setting struct {
	key, help string
	value     flag.Value
}

// settings lists the keys that flags and the kernel command line may set.
func (c *Config) settings() []setting {
	return []setting{
		{"listen", "addresses of the ttrpc service, separated by commas", &list{at: &c.Listen}},
		{"stream_listen", "address for the streams of containers", (*text)(&c.StreamListen)},
		{"cdh_socket", "socket that kata-agent calls; empty for none", (*text)(&c.CDHSocket)},
		{"cdh_forward", "socket of a real Confidential Data Hub", (*text)(&c.CDHForward)},
		{"cdh_forward_config", "file to write that one's configuration to", (*text)(&c.CDHForwardConfig)},
		{"host_address", "address of the node's Host service; empty for none", (*text)(&c.HostAddress)},
		{"relay_address", "address of the node's relay; empty for none", (*text)(&c.RelayAddress)},
		{"registry", "ask registries when the node cannot serve", (*boolean)(&c.Registry)},
		{"registry_address", "dialled in place of every registry's address", (*text)(&c.RegistryAddr)},
		{"plain_http", "registry hosts without TLS, separated by commas", &list{at: &c.PlainHTTP}},
		{"credentials", "files with credentials of registries, separated by commas", &list{at: &c.Credentials}},
		{"trust", "least binding of an index: host or image", (*text)(&c.Trust)},
		{"virtiofs", "take images from the node's files over virtio-fs: auto or off", (*text)(&c.VirtioFS)},
		{"virtiofs_dirs", "directories with those files, separated by commas", &list{at: &c.VirtioFSDirs}},
		{"profile", "record what starts of containers read, and fetch what earlier ones read", (*boolean)(&c.Profile)},
		{"patience", "how long reads wait while no source works", &c.Patience},
		{"state_dir", "directory of the mount table and the sockets", (*text)(&c.StateDir)},
		{"store_dir", "directory where fetched bytes are kept; empty keeps nothing", (*text)(&c.StoreDir)},
		{"store_memory", "bound of fetched bytes that wait for a reader", (*size)(&c.StoreMemory)},
		{"mount_path", "auto, file or loop", (*text)(&c.MountPath)},
		{"runner", "offer the Runner service", (*boolean)(&c.Runner)},
		{"runtime", "OCI runtime; empty looks for crun, then runc", (*text)(&c.Runtime)},
		{"hostname", "name of a virtual machine of ours", (*text)(&c.Hostname)},
		{"net.interface", "network interface that init sets up", (*text)(&c.Net.Interface)},
		{"net.address", "its address with prefix length", (*text)(&c.Net.Address)},
		{"net.gateway", "default gateway", (*text)(&c.Net.Gateway)},
		{"net.dns", "name servers, separated by commas", &list{at: &c.Net.DNS}},
		{"log_level", "debug, info, warn or error", (*text)(&c.LogLevel)},
	}
}

// Load returns the configuration that args (flags without the program's name)
// and cmdline (the text of /proc/cmdline) ask for, and the arguments that are
// no flags. The class of every error is InvalidArgument, except for -help,
// which is flag.ErrHelp with the usage written to usage.
func Load(args []string, cmdline string, usage io.Writer) (*Config, []string, error) {
	c := Default()
	named, err := filesOf(args)
	if err != nil {
		return nil, nil, err
	}
	if err := c.readFiles(named); err != nil {
		return nil, nil, err
	}
	rest, err := c.parseFlags(args, usage)
	if err != nil {
		return nil, nil, err
	}
	if err := c.parseCmdline(cmdline); err != nil {
		return nil, nil, err
	}
	if err := c.validate(); err != nil {
		return nil, nil, err
	}
	return &c, rest, nil
}

// files are the configuration files that flags name.
type files struct{ own, cdh string }

// filesOf finds the configuration files among the flags: they must be read
// before them, because flags override them.
func filesOf(args []string) (files, error) {
	var scratch Config
	var named files
	fs := scratch.flagSet(&named)
	fs.SetOutput(io.Discard)
	if err := fs.Parse(args); err != nil && !errors.Is(err, flag.ErrHelp) {
		return files{}, invalid("%v (--help lists the flags)", err)
	}
	return named, nil
}

func (c *Config) readFiles(named files) error {
	if err := c.readFile(cmp.Or(named.own, DefaultFile), named.own != ""); err != nil {
		return err
	}
	if named.cdh == "" {
		return nil
	}
	b, err := os.ReadFile(named.cdh)
	if err != nil {
		return invalid("read configuration: %v", err)
	}
	c.CDHConfig = named.cdh
	return c.parseCDH(named.cdh, b)
}

func (c *Config) flagSet(named *files) *flag.FlagSet {
	fs := flag.NewFlagSet("tatami-guest", flag.ContinueOnError)
	fs.StringVar(&named.own, "config", "", "configuration file (default "+DefaultFile+")")
	fs.StringVar(&named.cdh, "cdh-config", "", "configuration file of a Confidential Data Hub, whose table [tatami] is read")
	// kata-agent starts processes with -c and the path of cdh.toml, if the pod's
	// initdata has one (kata-containers: src/agent/src/main.rs launch_process).
	fs.StringVar(&named.cdh, "c", "", "the same as --cdh-config")
	for _, s := range c.settings() {
		fs.Var(s.value, flagName(s.key), s.help)
	}
	return fs
}

func flagName(key string) string {
	return strings.NewReplacer("_", "-", ".", "-").Replace(key)
}

func (c *Config) parseFlags(args []string, usage io.Writer) ([]string, error) {
	fs := c.flagSet(new(files))
	fs.SetOutput(usage)
	if err := fs.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, err
		}
		return nil, invalid("%v", err)
	}
	return fs.Args(), nil
}

func (c *Config) readFile(name string, named bool) error {
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) && !named {
		return nil
	}
	if err != nil {
		return invalid("read configuration: %v", err)
	}
	return c.parseFile(name, b)
}

func (c *Config) parseFile(name string, b []byte) error {
	c.Version = 0
	err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(c)
	if unknown := unknownKeys(err); len(unknown) > 0 {
		return invalid("%s: unknown key %q: remove it, or use the tatami-guest that knows it", name, unknown[0])
	}
	if err != nil {
		return invalid("%s: %v", name, err)
	}
	return c.checkVersion(name)
}

func (c *Config) checkVersion(name string) error {
	if c.Version != Version {
		return invalid("%s: version is %d: this tatami-guest reads version = %d", name, c.Version, Version)
	}
	return nil
}

// unknownKeys lists the keys that decoding had no place for; none for any other
// error.
func unknownKeys(err error) (keys []string) {
	var unknown *toml.StrictMissingError
	if errors.As(err, &unknown) {
		for _, e := range unknown.Errors {
			keys = append(keys, strings.Join(e.Key(), "."))
		}
	}
	return keys
}

func (c *Config) parseCmdline(cmdline string) error {
	byKey := make(map[string]flag.Value)
	for _, s := range c.settings() {
		byKey[s.key] = s.value
	}
	for _, word := range splitCmdline(cmdline) {
		word, ours := strings.CutPrefix(word, cmdlinePrefix)
		if !ours {
			continue
		}
		key, value, hasValue := strings.Cut(word, "=")
		// The kernel takes "-" and "_" in the name of a parameter for the same.
		key = strings.ReplaceAll(key, "-", "_")
		v, known := byKey[key]
		if !known {
			return invalid("kernel command line: unknown key %q", cmdlinePrefix+key)
		}
		if _, isBool := v.(*boolean); isBool && !hasValue {
			value = "true"
		}
		if err := v.Set(value); err != nil {
			return invalid("kernel command line: %s: %v", cmdlinePrefix+key, err)
		}
	}
	return nil
}

// splitCmdline cuts a kernel command line into words as the kernel does
// (lib/cmdline.c next_arg): spaces separate, double quotes hold together.
func splitCmdline(s string) []string {
	var words []string
	var word strings.Builder
	quoted, inWord := false, false
	for _, r := range s {
		switch {
		case r == '"':
			quoted, inWord = !quoted, true
		case !quoted && (r == ' ' || r == '\n' || r == '\t' || r == 0):
			if inWord {
				words = append(words, word.String())
			}
			word.Reset()
			inWord = false
		default:
			word.WriteRune(r)
			inWord = true
		}
	}
	if inWord {
		words = append(words, word.String())
	}
	return words
}

func invalid(format string, args ...any) error {
	return fmt.Errorf("configuration: "+format+": %w", append(args, errdefs.ErrInvalidArgument)...)
}
