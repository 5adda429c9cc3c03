package index

import (
	"fmt"
	"strings"
)

// Limits of names as Linux has them, in bytes.
const (
	MaxName       = 255   // one element of a path, or the name of an attribute
	MaxPath       = 4095  // a whole path, or the target of a symlink
	MaxXattrValue = 65536 // the value of an attribute
	maxMajor      = 1<<12 - 1
	maxMinor      = 1<<20 - 1
)

// Validate checks an entry of a layer whose segment has the given size in
// bytes: everything that the type promises, and that fields which its kind
// does not use are zero. The error does not name the entry.
func (e *Entry) Validate(segment int64) error {
	if e.Kind < File || e.Kind > Opaque {
		return invalid("unknown kind %d", e.Kind)
	}
	if e.Path != "" {
		if err := checkPath(e.Path); err != nil {
			return invalid("path: %w", err)
		}
	} else if e.Kind != Dir && e.Kind != Opaque {
		return invalid("the root can only be a directory")
	}
	if e.Mode > 0o7777 {
		return invalid("mode %#o has more than permission bits", e.Mode)
	}
	if e.Nsec >= 1e9 {
		return invalid("%d nanoseconds make more than a second", e.Nsec)
	}
	if err := e.checkKind(segment); err != nil {
		return err
	}
	return checkXattrs(e.Xattrs)
}

// checkKind checks the fields that only some kinds have.
func (e *Entry) checkKind(segment int64) error {
	switch e.Kind {
	case File:
		if e.Size < 0 || e.Off < 0 || e.Off%BlockSize != 0 || e.Size > segment-e.Off || (e.Size == 0 && e.Off != 0) {
			return invalid("content at %d, %d bytes, is not within a segment of %d bytes", e.Off, e.Size, segment)
		}
	case Symlink:
		if e.Link == "" || len(e.Link) > MaxPath || strings.IndexByte(e.Link, 0) >= 0 {
			return invalid("target of a symlink is %d bytes long or has a zero byte", len(e.Link))
		}
	case Hardlink:
		if err := checkPath(e.Link); err != nil {
			return invalid("target of a hard link: %w", err)
		}
	case Char, Block:
		if e.Major > maxMajor || e.Minor > maxMinor {
			return invalid("device number %d:%d is over %d:%d", e.Major, e.Minor, maxMajor, maxMinor)
		}
	}
	return e.checkUnused()
}

func (e *Entry) checkUnused() error {
	if e.Kind != File && (e.Size != 0 || e.Off != 0) {
		return invalid("content in something that is not a file")
	}
	if e.Kind != Symlink && e.Kind != Hardlink && e.Link != "" {
		return invalid("target in something that is not a link")
	}
	if e.Kind != Char && e.Kind != Block && (e.Major != 0 || e.Minor != 0) {
		return invalid("device number in something that is not a device")
	}
	return nil
}

// checkPath accepts clean relative paths.
func checkPath(p string) error {
	if len(p) > MaxPath {
		return fmt.Errorf("%d bytes are over %d", len(p), MaxPath)
	}
	if strings.IndexByte(p, 0) >= 0 {
		return fmt.Errorf("%q has a zero byte", p)
	}
	for rest, more := p, true; more; {
		var name string
		name, rest, more = strings.Cut(rest, "/")
		if name == "" || name == "." || name == ".." || len(name) > MaxName {
			return fmt.Errorf("%.80q is not clean and relative with names up to %d bytes", p, MaxName)
		}
	}
	return nil
}

func checkXattrs(xattrs []Xattr) error {
	for i, x := range xattrs {
		if x.Name == "" || len(x.Name) > MaxName || strings.IndexByte(x.Name, 0) >= 0 {
			return invalid("name of extended attribute %.80q", x.Name)
		}
		if i > 0 && xattrs[i-1].Name >= x.Name {
			return invalid("extended attribute %q is not in order", x.Name)
		}
		if len(x.Value) > MaxXattrValue {
			return invalid("extended attribute %q of %d bytes is over %d", x.Name, len(x.Value), MaxXattrValue)
		}
	}
	return nil
}
