package virtiofsd

import (
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Options are what the command line asks for.
type Options struct {
	SharedDir  string
	SocketPath string // where to listen, or
	FD         int    // a socket that listens already; -1 for none
	Cache      string // never, auto, metadata or always
	Tag        string
	Syslog     bool
	Debug      bool
	Notes      []string // what was accepted and has no effect
}

const usage = `usage: tatami-virtiofsd --shared-dir DIR (--socket-path PATH | --fd N) [options]

Shows the image files that lie in DIR to one virtual machine over virtio-fs,
read-only, until the VMM closes its connection. Only regular files directly in DIR
are served, those whose names begin with a dot are not; files may be added (by
rename) and removed meanwhile. There is no passthrough: a tree of directories
is not served, symbolic links are not followed, nothing can be written.

  --shared-dir DIR      the directory of images
  --socket-path PATH    make a socket for the VMM there
  --fd N                or take this listening socket
  --cache MODE          always: the guest keeps pages of the files themselves;
                        never, auto, metadata: only of what it mounts from them
  --tag TAG             name of the file system, for VMMs that ask for it
  --syslog              log there instead of to standard error
  --log-level LEVEL     "debug" logs more

It takes the command lines that Kata Containers makes for its virtiofsd (settings
virtio_fs_daemon and virtio_fs_extra_args). Options of virtiofsd that mean nothing
here are accepted with a note; those that ask for writing, other identities or less
protection are refused.
`

// option is what becomes of an option; without set it is accepted with a note.
type option struct {
	value bool // it has one
	set   func(o *Options, value string) error
}

// options are those of this program, and those of virtiofsd (its README.md,
// section Usage) and of QEMU's program of that name that have no effect here.
var options = map[string]option{
	"shared-dir":  {true, func(o *Options, v string) error { o.SharedDir = v; return nil }},
	"socket-path": {true, func(o *Options, v string) error { o.SocketPath = v; return nil }},
	"fd":          {true, setFD},
	"cache":       {true, func(o *Options, v string) error { o.Cache = v; return nil }},
	"tag":         {true, func(o *Options, v string) error { o.Tag = v; return nil }},
	"log-level":   {true, func(o *Options, v string) error { o.Debug = v == "debug" || v == "trace"; return nil }},
	"syslog":      {false, func(o *Options, _ string) error { o.Syslog = true; return nil }},
	"sandbox":     {true, protection},
	"seccomp":     {true, protection},

	"thread-pool-size": {value: true}, "inode-file-handles": {value: true}, "rlimit-nofile": {value: true},
	"xattr": {}, "no-xattr": {}, "f": {}, "d": {}, "readonly": {}, "no-readdirplus": {}, "announce-submounts": {},
	"allow-direct-io": {}, "allow-mmap": {}, "preserve-noatime": {}, "killpriv-v2": {}, "no-killpriv-v2": {},
}

func setFD(o *Options, v string) error {
	n, err := strconv.ParseUint(v, 10, 31)
	if err != nil {
		return fmt.Errorf("%w: %q is not the number of a descriptor", errdefs.ErrInvalidArgument, v)
	}
	o.FD = int(n)
	return nil
}

// protection accepts any kind of it but none.
func protection(_ *Options, v string) error {
	if v == "none" {
		return fmt.Errorf("%w: protection cannot be turned off", errdefs.ErrInvalidArgument)
	}
	return nil
}

// refused are the options that must not be passed over in silence, and why.
var refused = map[string]string{
	"writeback":      "nothing can be written here",
	"modcaps":        "this process gives up all capabilities",
	"socket-group":   "the socket is for this user alone; start the VMM as the same user, or pass a socket with --fd",
	"uid-map":        "identities are not mapped here",
	"gid-map":        "identities are not mapped here",
	"translate-uid":  "identities are not mapped here",
	"translate-gid":  "identities are not mapped here",
	"xattrmap":       "files have no extended attributes here",
	"posix-acl":      "files have no access control lists here",
	"security-label": "files have no labels here",
	"migration-mode": "a session cannot be moved",
	"daemonize":      "run it under a supervisor instead",
}

// parser walks a command line.
type parser struct {
	args []string
	o    Options
	// loose: the option before was not known, so this may be its value.
	loose bool
}

// Parse reads a command line. flag.ErrHelp means that help was asked for and
// written to out.
func Parse(args []string, out io.Writer) (*Options, error) {
	p := parser{args: args, o: Options{FD: -1, Cache: "auto"}}
	for len(p.args) > 0 {
		arg := p.args[0]
		p.args = p.args[1:]
		if arg == "-h" || arg == "--help" {
			_, err := io.WriteString(out, usage)
			if err != nil {
				return nil, err
			}
			return nil, flag.ErrHelp
		}
		if err := p.argument(arg); err != nil {
			return nil, err
		}
	}
	return &p.o, p.o.check()
}

func (p *parser) argument(arg string) error {
	name, isOption := strings.CutPrefix(arg, "-")
	if !isOption || name == "" {
		if !p.loose {
			return fmt.Errorf("argument %q: %w: only options are expected, see --help", arg, errdefs.ErrInvalidArgument)
		}
		p.loose = false
		p.note(arg)
		return nil
	}
	p.loose = false
	name, value, has := strings.Cut(strings.TrimPrefix(name, "-"), "=")
	if name == "o" {
		return p.compat(value, has)
	}
	return p.option(name, value, has, p.next)
}

// next takes the following argument as the value of an option.
func (p *parser) next() (string, bool) {
	if len(p.args) == 0 {
		return "", false
	}
	v := p.args[0]
	p.args = p.args[1:]
	return v, true
}

// compat reads the list behind -o, which the C virtiofsd had.
func (p *parser) compat(list string, has bool) error {
	if !has {
		if list, has = p.next(); !has {
			return fmt.Errorf("option -o: %w: a list must follow", errdefs.ErrInvalidArgument)
		}
	}
	for _, item := range strings.Split(list, ",") {
		name, value, has := strings.Cut(item, "=")
		if name == "source" {
			name = "shared-dir"
		}
		none := func() (string, bool) { return "", false }
		if err := p.option(strings.ReplaceAll(name, "_", "-"), value, has, none); err != nil {
			return err
		}
		p.loose = false
	}
	return nil
}

// option takes one option; next gives the argument behind it where its value is
// not part of it.
func (p *parser) option(name, value string, has bool, next func() (string, bool)) error {
	if why := refused[name]; why != "" {
		return fmt.Errorf("option %s: %w: %s", name, errdefs.ErrInvalidArgument, why)
	}
	opt, known := options[name]
	if opt.value && !has {
		if value, has = next(); !has {
			return fmt.Errorf("option %s: %w: a value must follow", name, errdefs.ErrInvalidArgument)
		}
	}
	if opt.set == nil {
		p.loose = !known && !has
		p.note(name)
		return nil
	}
	if err := opt.set(&p.o, value); err != nil {
		return fmt.Errorf("option %s: %w", name, err)
	}
	return nil
}

func (p *parser) note(option string) { p.o.Notes = append(p.o.Notes, option) }

func (o *Options) check() error {
	switch {
	case o.SharedDir == "":
		return fmt.Errorf("%w: --shared-dir is missing", errdefs.ErrInvalidArgument)
	case (o.SocketPath == "") == (o.FD < 0):
		return fmt.Errorf("%w: one of --socket-path and --fd is needed", errdefs.ErrInvalidArgument)
	case !slices.Contains([]string{"never", "auto", "metadata", "always"}, o.Cache):
		return fmt.Errorf("%w: --cache %q is not one of never, auto, metadata, always", errdefs.ErrInvalidArgument, o.Cache)
	}
	return nil
}
