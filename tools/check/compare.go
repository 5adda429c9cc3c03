package check

import (
	"archive/tar"
	"context"
	"os"
	"path"
	"slices"
	"strings"
	"time"

	"github.com/tatami-containers/tatami/rootfs/formats"
	"github.com/tatami-containers/tatami/rootfs/index"
)

// compare holds the entries of an index against the contents of the tar.
func (w *Way) compare(ctx context.Context, l *index.Layer, segment *os.File, want *contents) error {
	seen := map[string]bool{}
	for i := len(l.Entries) - 1; i >= 0; i-- { // of equal names the last counts
		e := &l.Entries[i]
		name := tarName(e)
		if seen[name] {
			continue
		}
		seen[name] = true
		f, ok := want.files[name]
		if !ok {
			w.problem("%q is in the index and not in the layer", name)
			continue
		}
		if err := w.compareFile(ctx, name, e, f, segment); err != nil {
			return err
		}
	}
	for name := range want.files {
		if !seen[name] && !optional(name) {
			w.problem("%q is in the layer and not in the index", name)
		}
	}
	return nil
}

// tarName is the name that an entry has in a tar.
func tarName(e *index.Entry) string {
	switch e.Kind {
	case index.Whiteout:
		dir, base := path.Split(e.Path)
		return dir + ".wh." + base
	case index.Opaque:
		return strings.TrimPrefix(e.Path+"/.wh..wh..opq", "/")
	}
	return e.Path
}

// flags are the kinds of entries as a tar has them.
var flags = map[index.Kind]byte{
	index.File: tar.TypeReg, index.Dir: tar.TypeDir, index.Symlink: tar.TypeSymlink, index.Hardlink: tar.TypeLink,
	index.Char: tar.TypeChar, index.Block: tar.TypeBlock, index.Fifo: tar.TypeFifo,
}

func (w *Way) compareFile(ctx context.Context, name string, e *index.Entry, f file, segment *os.File) error {
	if e.Kind == index.Whiteout || e.Kind == index.Opaque {
		return nil // there is no more to it than the name
	}
	if flags[e.Kind] != f.kind {
		w.problem("%q has type %q in the layer, %q in the index", name, f.kind, flags[e.Kind])
		return nil
	}
	if e.Kind == index.Hardlink {
		if e.Link != f.link {
			w.problem("%q is a hard link to %q in the layer, to %q in the index", name, f.link, e.Link)
		}
		return nil
	}
	w.compareAttributes(name, e, f)
	if e.Kind != index.File {
		return nil
	}
	got, err := sum(ctx, e, segment)
	if err != nil {
		return err
	}
	if e.Size != f.size || got != f.sum {
		w.problem("%q: its content, %d bytes, is not that in the layer, %d bytes", name, e.Size, f.size)
	}
	return nil
}

func (w *Way) compareAttributes(name string, e *index.Entry, f file) {
	if int64(e.Mode) != f.mode {
		w.problem("%q has mode %#o in the layer, %#o in the index", name, f.mode, e.Mode)
	}
	if int(e.UID) != f.uid || int(e.GID) != f.gid {
		w.problem("%q belongs to %d:%d in the layer, to %d:%d in the index", name, f.uid, f.gid, e.UID, e.GID)
	}
	if !w.sameTime(time.Unix(e.Sec, int64(e.Nsec)), f.time) {
		w.problem("%q was modified at %s in the layer, at %s in the index", name, f.time.UTC(), time.Unix(e.Sec, int64(e.Nsec)).UTC())
	}
	if e.Kind == index.Symlink && e.Link != f.link {
		w.problem("%q is a symlink to %q in the layer, to %q in the index", name, f.link, e.Link)
	}
	if (e.Kind == index.Char || e.Kind == index.Block) && (int64(e.Major) != f.major || int64(e.Minor) != f.minor) {
		w.problem("%q is device %d:%d in the layer, %d:%d in the index", name, f.major, f.minor, e.Major, e.Minor)
	}
	if !slices.Equal(e.Xattrs, f.xattrs) {
		w.problem("%q has other extended attributes in the layer than in the index", name)
	}
}

// sameTime allows for formats whose times are whole seconds.
func (w *Way) sameTime(got, want time.Time) bool {
	if got.Equal(want) {
		return true
	}
	seconds := w.From == formats.FromTOC || w.From == formats.FromSOCI
	return seconds && got.Nanosecond() == 0 && got.Sub(want).Abs() < time.Second
}
