package mount

import (
	"fmt"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/mount/imagefs"
)

// File is an image as an address space. If it is an io.Closer it is closed
// when nothing reads it any more.
type File = imagefs.File

// Spec says what to mount where.
type Spec struct {
	ID        string        // names the mount: letters, digits, "_", ".", "-"
	Reference string        // of the image, for people
	Manifest  digest.Digest // names the image: same digest, same bytes
	// Image is taken over, also when Mount fails. It, or Local, is needed.
	Image File
	// Local is the absolute path of a file that holds the image. It is mounted
	// without this process between, and must not change while it is.
	Local string
	// Source names where the bytes come from, for people. The first mount of an
	// image decides about Image or Local and Source; others share what is there.
	Source string
	Target string // absolute path, made when missing
	// Upper is an absolute directory that gets upper/ and work/ and belongs to
	// this mount alone; "" means a tmpfs that goes with the mount.
	Upper    string
	ReadOnly bool // no overlay: the image itself appears at Target
}

// maxID is the longest ID in bytes. With maxStateDir it keeps every path that
// goes to fsconfig(2) below its limit.
const (
	maxID       = 128
	maxStateDir = 100
)

func (s Spec) validate() error {
	if err := validateID(s.ID); err != nil {
		return err
	}
	if err := s.Manifest.Validate(); err != nil {
		return fmt.Errorf("mount %s: manifest digest %q: %w: %w", s.ID, s.Manifest, err, errdefs.ErrInvalidArgument)
	}
	if err := s.validateImage(); err != nil {
		return err
	}
	if !filepath.IsAbs(s.Target) || filepath.Clean(s.Target) == "/" {
		return fmt.Errorf("mount %s: target %q is not an absolute path below the root: %w", s.ID, s.Target, errdefs.ErrInvalidArgument)
	}
	if s.Upper != "" && !filepath.IsAbs(s.Upper) {
		return fmt.Errorf("mount %s: upper directory %q is not an absolute path: %w", s.ID, s.Upper, errdefs.ErrInvalidArgument)
	}
	if s.Upper != "" && s.ReadOnly {
		return fmt.Errorf("mount %s: a read-only mount has no upper directory: %w", s.ID, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (s Spec) validateImage() error {
	switch {
	case s.Image != nil && s.Local != "":
		return fmt.Errorf("mount %s: both an image and the file %q of one: %w", s.ID, s.Local, errdefs.ErrInvalidArgument)
	case s.Local != "" && !filepath.IsAbs(s.Local):
		return fmt.Errorf("mount %s: image file %q is not an absolute path: %w", s.ID, s.Local, errdefs.ErrInvalidArgument)
	case s.Local == "" && (s.Image == nil || !wholeBlocks(s.Image.Size())):
		return fmt.Errorf("mount %s: image of whole 4 KiB blocks is needed: %w", s.ID, errdefs.ErrInvalidArgument)
	}
	return nil
}

func wholeBlocks(size int64) bool { return size > 0 && size%blockSize == 0 }

func validateID(id string) error {
	if id == "" || len(id) > maxID {
		return fmt.Errorf("mount ID of %d bytes, 1 to %d are allowed: %w", len(id), maxID, errdefs.ErrInvalidArgument)
	}
	for i, c := range []byte(id) {
		letter := c >= 'a' && c <= 'z' || c >= 'A' && c <= 'Z' || c >= '0' && c <= '9'
		if !letter && (i == 0 || !strings.ContainsRune("_.-", rune(c))) {
			return fmt.Errorf("mount ID %q: letters, digits and after the first also _ . - are allowed: %w", id, errdefs.ErrInvalidArgument)
		}
	}
	return nil
}

// validateStateDir keeps characters away that overlay mounts treat specially.
func validateStateDir(dir string) error {
	if !filepath.IsAbs(dir) || len(dir) > maxStateDir || strings.ContainsAny(dir, `,:\"`) {
		return fmt.Errorf("state directory %q: an absolute path of at most %d bytes without , : \\ and \" is needed: %w", dir, maxStateDir, errdefs.ErrInvalidArgument)
	}
	return nil
}
