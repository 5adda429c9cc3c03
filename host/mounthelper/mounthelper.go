// Package mounthelper mounts what a snapshotter returns in the modes guest and nydus
// when it is containerd itself that mounts it, as it does to look up a user in the
// image's /etc/passwd: an overlay over the image, which tatami-host serves lazily.
// The options that are meant for Kata's runtimes are left out.
//
// containerd runs mount.fuse for mount types that begin with "fuse."
// (mountWithHelper in its core/mount/mount_linux.go), and that runs
//
//	<helper> <source> <target> [-o <option>[,<option>]…]
package mounthelper

import (
	"fmt"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/volume"
)

// request is what to mount where.
type request struct {
	target string
	flags  uintptr
	data   string
}

// Main mounts as args (without the program's name) say.
func Main(args []string) error {
	r, err := parse(args)
	if err != nil {
		return err
	}
	if err := unix.Mount("overlay", r.target, "overlay", r.flags, r.data); err != nil {
		return fmt.Errorf("mount overlay at %s with %s: %w", r.target, r.data, err)
	}
	return nil
}

func parse(args []string) (r request, err error) {
	var words, options []string
	for i := 0; i < len(args); i++ {
		if args[i] != "-o" {
			words = append(words, args[i])
			continue
		}
		if i++; i == len(args) {
			return r, fmt.Errorf("-o: options are missing: %w", errdefs.ErrInvalidArgument)
		}
		options = append(options, split(args[i])...)
	}
	if len(words) != 2 || words[0] != "overlay" || !filepath.IsAbs(words[1]) {
		return r, fmt.Errorf("arguments %q: give overlay, an absolute target, and -o options: %w", args, errdefs.ErrInvalidArgument)
	}
	r.target = words[1]
	return r, r.set(options)
}

// split cuts options at commas that no backslash precedes.
func split(s string) (out []string) {
	start := 0
	for i := 0; i < len(s); i++ {
		switch s[i] {
		case '\\':
			i++
		case ',':
			out, start = append(out, s[start:i]), i+1
		}
	}
	return append(out, s[start:])
}

// flags of mount(2), by the names that mount(8) has for them.
var flags = map[string]uintptr{
	"ro": unix.MS_RDONLY, "nodev": unix.MS_NODEV, "nosuid": unix.MS_NOSUID, "noexec": unix.MS_NOEXEC,
	"noatime": unix.MS_NOATIME, "relatime": unix.MS_RELATIME,
	// The defaults, which containerd and mount.fuse add.
	"rw": 0, "dev": 0, "suid": 0, "exec": 0, "async": 0, "defaults": 0, "": 0,
}

func (r *request) set(options []string) error {
	var data []string
	for _, o := range options {
		if flag, ok := flags[o]; ok {
			r.flags |= flag
			continue
		}
		if strings.HasPrefix(o, volume.Prefix) || strings.HasPrefix(o, volume.ExtraPrefix) {
			continue // for Kata
		}
		data = append(data, o)
	}
	if !slices.ContainsFunc(data, func(o string) bool { return strings.HasPrefix(o, "lowerdir=") }) {
		return fmt.Errorf("options %q have no lowerdir: this program mounts what Tatami's snapshotter gives containerd: %w", options, errdefs.ErrInvalidArgument)
	}
	r.data = strings.Join(data, ",")
	return nil
}
