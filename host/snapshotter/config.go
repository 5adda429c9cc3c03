package snapshotter

import (
	"context"
	"fmt"
	"log/slog"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/errdefs"
)

// Mode says how a container gets its root file system.
type Mode string

const (
	// Guest: the VM mounts the image lazily. Kata's image_guest_pull.
	Guest Mode = "guest"
	// Block: the VM gets the one-file image as a disk. Kata's runtime-rs.
	Block Mode = "block"
	// Share: the host mounts the image lazily and an overlay over it, for
	// Kata's virtiofsd and for runc.
	Share Mode = "share"
	// Nydus: the host mounts the image lazily and the virtio-fs daemon of Kata's
	// shared_fs "virtio-fs-nydus", which is tatami-virtiofsd, shows it to the VM,
	// whose kernel makes the overlay.
	Nydus Mode = "nydus"
	// Full: containerd unpacks the layers here, as for its overlayfs.
	Full Mode = "full"
)

var modes = []Mode{Guest, Block, Share, Nydus, Full}

// Bounds of the image for writes in block mode, in bytes: what mkfs.ext4 can
// make of it, and the largest ext4 with blocks of 4 KiB.
const (
	minUpper = 8 << 20
	maxUpper = 16 << 40
)

// Config describes one snapshotter.
type Config struct {
	// Root is the directory that holds all of it, on a file system that
	// overlayfs can write to. Only this snapshotter uses it.
	Root string
	// Name is what containerd calls the snapshotter: lower-case letters,
	// digits, "-" and "_".
	Name string
	// Mode is that of a container which does not ask for one.
	Mode Mode
	// Allow lists the modes that a container may ask for by the label
	// LabelMode, which an author of pods or images can set.
	Allow []Mode
	// Fallback lists the modes to try, in order, when one cannot serve an
	// image. Without Full an image that cannot be served lazily is an error.
	Fallback []Mode
	// Verified serves an image lazily only if the node has held all its layers
	// against their diffIDs. containerd takes layers of equal chain ID for the
	// same, whoever published them: what is mounted for one image may be that of
	// another which only claims its diffIDs.
	Verified bool
	// UpperSize is the size in bytes of the ext4 image for writes in block
	// mode, a sparse file. 0: none, the guest keeps writes in its memory.
	UpperSize int64
	// MountHelper is the absolute path of the program that mounts for
	// containerd in guest mode. Its name begins with "nydus-overlayfs".
	MountHelper string
	// Images is the node.
	Images Images
	// Owners counts the images of all snapshotters of Images; one of its own
	// when nil.
	Owners *Owners
	// Pulling is the context in which an image is prepared that is being pulled; that
	// of the call when nil.
	Pulling func(ctx context.Context, ref string) context.Context
	Log     *slog.Logger

	// Of tests.
	step     func(name string) // called between the steps of a change
	lockWait time.Duration
}

var nameForm = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,63}$`)

func (c *Config) validate() error {
	if reason := c.invalid(); reason != "" {
		return fmt.Errorf("snapshotter %q: %s: %w", c.Name, reason, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (c *Config) invalid() string {
	switch {
	case !nameForm.MatchString(c.Name):
		return "a name is lower-case letters, digits, \"-\" and \"_\""
	case !plainPath(c.Root):
		return fmt.Sprintf("root %q is not an absolute path without comma, colon, quote and backslash", c.Root)
	case c.Images == nil:
		return "no images"
	}
	for _, m := range slices.Concat([]Mode{c.Mode}, c.Allow, c.Fallback) {
		if !slices.Contains(modes, m) {
			return fmt.Sprintf("mode %q is none of %v", m, modes)
		}
	}
	return c.invalidMode()
}

// invalidMode looks at what single modes need.
func (c *Config) invalidMode() string {
	helper := filepath.Base(c.MountHelper)
	switch {
	case c.UpperSize != 0 && (c.UpperSize < minUpper || c.UpperSize > maxUpper):
		return fmt.Sprintf("upper_size of %d bytes is neither 0 nor from %d to %d", c.UpperSize, int64(minUpper), int64(maxUpper))
	// What Kata's Go runtime knows guest pull by: IsNydusRootFSType in kata_agent.go.
	case c.uses(Guest) && (!plainPath(c.MountHelper) || !strings.HasPrefix(helper, "nydus-overlayfs")):
		return fmt.Sprintf("mount_helper %q is not the absolute path of a program whose name begins with \"nydus-overlayfs\"", c.MountHelper)
	}
	return ""
}

// uses says whether a container can have the mode.
func (c *Config) uses(m Mode) bool {
	return c.Mode == m || slices.Contains(c.Allow, m) || slices.Contains(c.Fallback, m)
}

// plainPath says whether path can stand in the options of an overlay mount,
// where comma, colon and backslash have a meaning.
func plainPath(path string) bool {
	return filepath.IsAbs(path) && filepath.Clean(path) == path && !strings.ContainsAny(path, ",:\\\"\n\x00")
}
