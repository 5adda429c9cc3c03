package tarball

import (
	"errors"
	"path"
	"strings"
)

// Clean turns the name of an entry or the target of a hard link into an
// Entry.Path: "./usr/", "/usr" and "usr" are all "usr". Names that leave the
// layer are errors; what else a path must be is left to Entry.Validate.
func Clean(name string) (string, error) {
	if name == "" {
		return "", errors.New("empty name")
	}
	p := path.Clean(strings.TrimLeft(name, "/"))
	switch {
	case p == ".":
		return "", nil
	case p == ".." || strings.HasPrefix(p, "../"):
		return "", errors.New("name leads out of the layer")
	}
	return p, nil
}

// Names with a meaning of their own in layers (OCI image-spec, layer.md).
const (
	whiteoutPrefix = ".wh."
	metaPrefix     = ".wh..wh." // of aufs; only the opaque marker means something
	opaqueName     = ".wh..wh..opq"
	linkDir        = ".wh..wh.plnk/" // of aufs: files that hard links point to
)

// Marker says what a clean path stands for in a layer.
type Marker uint8

// Markers.
const (
	NoMarker     Marker = iota // an ordinary entry
	WhiteoutMark               // hides the returned path
	OpaqueMark                 // hides what is below the returned path
	IgnoredMark                // metadata of aufs
)

// Mark recognises whiteouts and returns the path that they are about.
func Mark(p string) (Marker, string, error) {
	dir, base := path.Split(p)
	switch {
	case base == opaqueName:
		return OpaqueMark, strings.TrimSuffix(dir, "/"), nil
	case strings.HasPrefix(p, metaPrefix) || strings.Contains(p, "/"+metaPrefix):
		return IgnoredMark, "", nil
	case !strings.HasPrefix(base, whiteoutPrefix):
		return NoMarker, p, nil
	}
	hidden := base[len(whiteoutPrefix):]
	if hidden == "" || hidden == "." || hidden == ".." {
		return 0, "", errors.New("whiteout of no name")
	}
	return WhiteoutMark, dir + hidden, nil
}
