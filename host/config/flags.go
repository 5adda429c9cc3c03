package config

import (
	"flag"
	"fmt"
	"io"
	"strconv"
	"strings"
)

// Parse reads the program's arguments (without its name), the settings file
// that they name, and puts the flags over the file. Usage goes to usage; the
// error is flag.ErrHelp when that was all that was asked for.
func Parse(args []string, usage io.Writer) (Config, error) {
	return parse(args, usage, Path)
}

func parse(args []string, usage io.Writer, path string) (Config, error) {
	f := flags{path: path, optional: true}
	set := f.set(usage)
	if err := set.Parse(args); err != nil {
		return Config{}, err
	}
	if set.NArg() > 0 {
		return Config{}, fmt.Errorf("argument %q is not understood: tatami-host takes flags only", set.Arg(0))
	}
	c, err := load(f.path, f.optional)
	if err != nil {
		return Config{}, err
	}
	for _, apply := range f.over {
		apply(&c)
	}
	if f.plain != nil {
		c.Registry.PlainHTTP = f.plain
	}
	return c, c.check()
}

// flags collects what the command line says until the file is read.
type flags struct {
	path     string
	optional bool // path is the default one
	over     []func(*Config)
	plain    []string // stands in for the file's list
}

func (f *flags) set(usage io.Writer) *flag.FlagSet {
	s := flag.NewFlagSet("tatami-host", flag.ContinueOnError)
	s.SetOutput(usage)
	s.Func("config", "settings `file` (default "+f.path+", which may be absent)", func(v string) error {
		f.path, f.optional = v, false
		return nil
	})
	f.text(s, "root", "`directory` of everything the node keeps", func(c *Config) *string { return &c.Root })
	f.text(s, "socket", "control socket `path`", func(c *Config) *string { return &c.Socket })
	f.text(s, "images-socket", "`path` of the socket of virtio-fs devices", func(c *Config) *string { return &c.ImagesSocket })
	f.text(s, "state", "`directory` of mounts and sockets, on a tmpfs", func(c *Config) *string { return &c.State })
	f.text(s, "class", "`class` of containers of which nothing says it: online, batch, or one of the settings", func(c *Config) *string { return &c.Class })
	f.text(s, "log-level", "`level`: debug, info, warn or error", func(c *Config) *string { return &c.Log.Level })
	f.text(s, "log-format", "`format`: json or text", func(c *Config) *string { return &c.Log.Format })
	f.text(s, "credentials", "`places` of credentials, separated by \":\": Docker's config.json, pull secrets, the kubelet's config of providers, a kubeconfig", func(c *Config) *string { return &c.Registry.Credentials })
	f.number(s, "layers", "`number` of layers fetched at a time", func(c *Config) *int { return &c.Registry.Layers })
	f.number(s, "ranges", "`number` of parts of a layer fetched at a time", func(c *Config) *int { return &c.Registry.Ranges })
	s.Func("plain-http", "`hosts` asked without TLS, separated by commas; may be repeated", func(v string) error {
		f.plain = append(f.plain, strings.Split(v, ",")...)
		return nil
	})
	s.BoolFunc("discover", "find Kata's sandboxes by themselves", func(v string) error {
		b, err := strconv.ParseBool(v)
		f.over = append(f.over, func(c *Config) { c.Kata.Discover = b })
		return err
	})
	s.BoolFunc("check", "read the settings, say what is wrong with them, and end", func(string) error {
		f.over = append(f.over, func(c *Config) { c.Check = true })
		return nil
	})
	s.BoolFunc("idle-exit", "end when the last control connection has closed", func(v string) error {
		b, err := strconv.ParseBool(v)
		f.over = append(f.over, func(c *Config) { c.IdleExit = b })
		return err
	})
	return s
}

func (f *flags) text(s *flag.FlagSet, name, usage string, field func(*Config) *string) {
	s.Func(name, usage, func(v string) error {
		f.over = append(f.over, func(c *Config) { *field(c) = v })
		return nil
	})
}

func (f *flags) number(s *flag.FlagSet, name, usage string, field func(*Config) *int) {
	s.Func(name, usage, func(v string) error {
		n, err := strconv.Atoi(v)
		f.over = append(f.over, func(c *Config) { *field(c) = n })
		return err
	})
}
