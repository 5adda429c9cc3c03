package virtiofsd

import (
	"flag"
	"fmt"
	"io"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/virtiofs/confine"
	"github.com/tatami-containers/tatami/virtiofs/passthrough"
)

// Options are what the command line asks for.
type Options struct {
	SharedDir  string
	SocketPath string // where to listen, or
	FD         int    // a socket that listens already; -1 for none
	Images     string // tatami-host's socket of images; none when empty
	SandboxID  string // whose images these are
	Cache      string // never, auto, metadata or always
	Tag        string
	Sandbox    confine.Sandbox // "" for the strongest that is possible
	Trap       bool            // tell which system call was forbidden
	Syslog     bool
	Debug      bool
	Notes      []string // what was accepted and has no effect

	// Passthrough serves all of SharedDir, images of tatami-host below sharedimages.Dir;
	// with Nydus it allows to mount such a directory.
	Passthrough bool
	Files       FileOptions
	// Nydus is what nydusd does: all that is shown is mounted over the API.
	Nydus     bool
	APISocket string // where to answer the API
}

// FileOptions are for Passthrough.
type FileOptions struct {
	ReadOnly, XAttr, KillPriv, NoSubmounts bool
}

const usage = `usage: tatami-virtiofsd --shared-dir DIR (--socket-path PATH | --fd N) [options]
       tatami-virtiofsd virtiofs --sock PATH --apisock PATH [options]

Shows the image files that lie in DIR to one virtual machine over virtio-fs,
read-only, until the VMM closes its connection. Only regular files directly in DIR
are served, those whose names begin with a dot are not; files may be added (by
rename) and removed meanwhile. A tree of directories is not served, symbolic links
are not followed, nothing can be written, unless --passthrough asks for that.

  --shared-dir DIR      the directory of images
  --socket-path PATH    make a socket for the VMM there
  --fd N                or take this listening socket
  --images SOCKET       also serve the images that tatami-host at SOCKET grants the
                        sandbox (its setting images_socket), as <algorithm>-<digest
                        of the manifest>.erofs; they need not be on the node whole
  --sandbox-id ID       which sandbox that is; by default the one of Kata's DIR or
                        PATH (.../sandboxes/ID/..., .../ID/virtiofsd.sock)
  --cache MODE          always: the guest keeps pages of the files themselves;
                        never, auto, metadata: only of what it mounts from them.
                        With --passthrough as virtiofsd has it: of names and
                        attributes nothing (never), for a second (auto) or a day
  --tag TAG             name of the file system, for VMMs that ask for it
  --sandbox KIND        what the process that has the guest sees of this machine:
                        namespace: an empty root in namespaces of its own;
                        chroot: an empty root (as root only);
                        none: all directories, of which it may open nothing.
                        Without this option, the first of them that is possible.
  --seccomp ACTION      what a system call does that is not on its list:
                        kill: end that process;
                        trap: the same, with a stack trace before
  --syslog              log there instead of to standard error
  --log-level LEVEL     "debug" logs more

  --passthrough         serve all that is below DIR, for reading and writing: the
                        guest's root is root there. Images of --images then are
                        below .tatami, which is not listed; files of DIR are no
                        images. With it, as for virtiofsd:
  --readonly            nothing can be changed
  --xattr               files have extended attributes
  --killpriv-v2         set-user-ID bits are cleared here, not by the guest
  --no-announce-submounts  the guest does not see where mounts begin

As "virtiofs" it stands where Kata expects nydusd (shared_fs "virtio-fs-nydus"):
what the VM sees comes and goes by HTTP requests, below rafs/ the images of
containers, read-only, and in containers/ the directory that Kata shares.

  --sock PATH           make a socket for the VMM there
  --apisock PATH        make a socket for the requests there
  --passthrough         allow the mount of containers/, which Kata needs: the VM
                        may then write to the node's files in that directory

Whatever the sandbox, that process is the user nobody if this one is root's. It has
no capabilities, can open no file and make no connection (Landlock, seccomp); there
is no way to turn that off. One that shows directories keeps its user and the
capabilities for files, has no other directory, and needs the sandbox namespace.
When one that shows nothing but images ends, another one goes on in its
place, unless that happens too often; otherwise its end is that of this program.

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
	"images":      {true, func(o *Options, v string) error { o.Images = v; return nil }},
	"sandbox-id":  {true, func(o *Options, v string) error { o.SandboxID = v; return nil }},
	"cache":       {true, func(o *Options, v string) error { o.Cache = v; return nil }},
	"tag":         {true, func(o *Options, v string) error { o.Tag = v; return nil }},
	"log-level":   {true, func(o *Options, v string) error { o.Debug = v == "debug" || v == "trace"; return nil }},
	"syslog":      {false, func(o *Options, _ string) error { o.Syslog = true; return nil }},
	"sock":        {true, func(o *Options, v string) error { o.SocketPath = v; return nil }},
	"apisock":     {true, func(o *Options, v string) error { o.APISocket = v; return nil }},
	"passthrough": {false, func(o *Options, _ string) error { o.Passthrough = true; return nil }},
	"hybrid-mode": {false, func(*Options, string) error { return nil }}, // there is no other
	"sandbox":     {true, setSandbox},
	"seccomp":     {true, setSeccomp},

	"thread-pool-size": {value: true}, "inode-file-handles": {value: true}, "rlimit-nofile": {value: true},
	"f": {}, "d": {}, "no-readdirplus": {}, "allow-direct-io": {}, "allow-mmap": {}, "preserve-noatime": {},
	"thread-num": {value: true}, "id": {value: true}, "log-file": {value: true}, // nydusd

	"readonly": {}, "xattr": {}, "no-xattr": {}, "announce-submounts": {}, "no-announce-submounts": {},
	"killpriv-v2": {}, "no-killpriv-v2": {},
}

// fileOptions are those that have an effect with Passthrough only.
var fileOptions = map[string]func(*FileOptions){
	"readonly": func(o *FileOptions) { o.ReadOnly = true },
	"xattr":    func(o *FileOptions) { o.XAttr = true }, "no-xattr": func(o *FileOptions) { o.XAttr = false },
	"announce-submounts":    func(o *FileOptions) { o.NoSubmounts = false },
	"no-announce-submounts": func(o *FileOptions) { o.NoSubmounts = true },
	"killpriv-v2":           func(o *FileOptions) { o.KillPriv = true }, "no-killpriv-v2": func(o *FileOptions) { o.KillPriv = false },
}

// applyNotes takes the options for Passthrough out of the notes, in their order.
func (o *Options) applyNotes() {
	if !o.Passthrough {
		return
	}
	o.Notes = slices.DeleteFunc(o.Notes, func(name string) bool {
		set := fileOptions[name]
		if set != nil {
			set(&o.Files)
		}
		return set != nil
	})
}

func setFD(o *Options, v string) error {
	n, err := strconv.ParseUint(v, 10, 31)
	if err != nil {
		return fmt.Errorf("%w: %q is not the number of a descriptor", errdefs.ErrInvalidArgument, v)
	}
	o.FD = int(n)
	return nil
}

func setSandbox(o *Options, v string) error {
	o.Sandbox = confine.Sandbox(v)
	if !slices.Contains([]confine.Sandbox{confine.Namespace, confine.Chroot, confine.None}, o.Sandbox) {
		return fmt.Errorf("%w: %q is not one of namespace, chroot, none", errdefs.ErrInvalidArgument, v)
	}
	return nil
}

// setSeccomp takes what ends the process. "log" would allow everything, as "none".
func setSeccomp(o *Options, v string) error {
	switch v {
	case "kill", "trap":
		o.Trap = v == "trap"
		return nil
	case "none", "log":
		return fmt.Errorf("%w: the filter of system calls cannot be turned off", errdefs.ErrInvalidArgument)
	}
	return fmt.Errorf("%w: %q is not one of kill, trap", errdefs.ErrInvalidArgument, v)
}

// refused are the options that must not be passed over in silence, and why.
var refused = map[string]string{
	"writeback":      "the guest does not keep what it writes",
	"modcaps":        "which capabilities this process keeps is fixed",
	"socket-group":   "the socket is for this user alone; start the VMM as the same user, or pass a socket with --fd",
	"uid-map":        "identities are not mapped here",
	"gid-map":        "identities are not mapped here",
	"translate-uid":  "identities are not mapped here",
	"translate-gid":  "identities are not mapped here",
	"xattrmap":       "names of extended attributes are not mapped here",
	"posix-acl":      "files have no access control lists here",
	"security-label": "files have no labels here",
	"migration-mode": "a session cannot be moved",
	"daemonize":      "run it under a supervisor instead",
	"bootstrap":      "images are mounted by requests",
	"upgrade":        "a session cannot be taken over",
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
	if len(args) > 0 && args[0] == "virtiofs" { // nydusd's command
		p.args, p.o.Nydus = args[1:], true
	}
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
	if p.o.Images != "" && p.o.SandboxID == "" {
		p.o.SandboxID = sandboxOf(p.o.SharedDir, p.o.SocketPath)
	}
	p.o.applyNotes()
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
	case !slices.Contains([]string{"never", "auto", "metadata", "always"}, o.Cache):
		return fmt.Errorf("%w: --cache %q is not one of never, auto, metadata, always", errdefs.ErrInvalidArgument, o.Cache)
	case o.Images != "" && sharedimages.CheckSandbox(o.SandboxID) != nil:
		return fmt.Errorf("%w: which sandbox has the images is not known: give --sandbox-id", errdefs.ErrInvalidArgument)
	case o.Nydus:
		return o.checkNydus()
	case o.APISocket != "":
		return fmt.Errorf("%w: --apisock belongs to the command virtiofs, see --help", errdefs.ErrInvalidArgument)
	case o.Passthrough && !o.enclosed():
		return fmt.Errorf("%w: --passthrough needs the sandbox namespace", errdefs.ErrInvalidArgument)
	case o.SharedDir == "":
		return fmt.Errorf("%w: --shared-dir is missing", errdefs.ErrInvalidArgument)
	case (o.SocketPath == "") == (o.FD < 0):
		return fmt.Errorf("%w: one of --socket-path and --fd is needed", errdefs.ErrInvalidArgument)
	}
	return nil
}

// enclosed: whoever has a directory can go up from it, but for walls of mounts.
func (o *Options) enclosed() bool { return o.Sandbox == "" || o.Sandbox == confine.Namespace }

// trees are what the child must know to show directories; nil when it shows none.
func (o *Options) trees() *treeOptions {
	if !o.Nydus && !o.Passthrough {
		return nil
	}
	t := &treeOptions{Cache: passthrough.Cache(o.Cache), Files: o.Files, Nydus: o.Nydus, Images: o.Images != ""}
	t.Files.XAttr = t.Files.XAttr || o.Nydus // of images, and for overlays of the guest
	return t
}

func (o *Options) checkNydus() error {
	switch {
	case o.SocketPath == "" || o.APISocket == "":
		return fmt.Errorf("%w: virtiofs needs --sock and --apisock", errdefs.ErrInvalidArgument)
	case o.SharedDir != "" || o.FD >= 0:
		return fmt.Errorf("%w: virtiofs takes no --shared-dir and no --fd: directories are mounted by requests", errdefs.ErrInvalidArgument)
	case !o.enclosed():
		return fmt.Errorf("%w: virtiofs needs the sandbox namespace", errdefs.ErrInvalidArgument)
	}
	return nil
}
