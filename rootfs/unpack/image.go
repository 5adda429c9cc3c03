// Package unpack is how an image becomes a file tree without lazy loading: the
// layers are downloaded in parallel, verified as wholes and unpacked, and
// overlay puts them together. It is the comparison that lazy mounts are
// measured and checked against, and what is left for an image that nothing
// else can serve. Therefore it shares no code with rootfs/layer and below: tar
// is read by archive/tar, gzip and zstd by github.com/klauspost/compress, whose
// gzip is the standard library's made faster.
package unpack

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
)

// Blobs is where layers come from.
type Blobs interface {
	// Open returns the blob as one stream of compressed bytes.
	Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)
}

// parallelLayers is how many layers are downloaded and unpacked at a time. Each
// takes two goroutines and about 2 MiB of buffers.
const parallelLayers = 4

// Image unpacks every layer into a directory of its own below dir, named "0"
// (the lowest), "1" and so on, in the form that overlay expects of lower
// directories, and makes an empty directory beside them. It returns the size of all files in bytes. diffIDs are those of
// the layers in their order; without any, none is checked.
func Image(ctx context.Context, dir string, layers []ocispec.Descriptor, diffIDs []digest.Digest, blobs Blobs) (size int64, err error) {
	if len(diffIDs) != 0 && len(diffIDs) != len(layers) {
		return 0, fmt.Errorf("unpack %d layers with %d diffIDs: %w", len(layers), len(diffIDs), errdefs.ErrInvalidArgument)
	}
	if err := os.MkdirAll(filepath.Join(dir, emptyLayer), 0o755); err != nil { //nolint:gosec // may become the root directory of a container
		return 0, err
	}
	left := make([]*leftover, len(layers))
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallelLayers)
	for i, desc := range layers {
		g.Go(func() (err error) {
			var diffID digest.Digest
			if len(diffIDs) != 0 {
				diffID = diffIDs[i]
			}
			if left[i], err = fetchLayer(ctx, filepath.Join(dir, strconv.Itoa(i)), desc, diffID, blobs); err != nil {
				return fmt.Errorf("unpack layer %s: %w", desc.Digest, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return 0, err
	}
	for i, l := range left {
		if err := l.settle(dir, i); err != nil {
			return 0, fmt.Errorf("unpack layer %s: %w", layers[i].Digest, err)
		}
		size += l.size
	}
	return size, nil
}

func fetchLayer(ctx context.Context, dir string, desc ocispec.Descriptor, diffID digest.Digest, blobs Blobs) (*leftover, error) {
	if err := os.Mkdir(dir, 0o755); err != nil {
		return nil, err
	}
	// os.Mkdir obeys the umask.
	if err := os.Chmod(dir, 0o755); err != nil { //nolint:gosec // the root directory of a container
		return nil, err
	}
	blob, err := blobs.Open(ctx, desc)
	if err != nil {
		return nil, err
	}
	left, err := unpackLayer(ctx, dir, blob, desc, diffID)
	return left, errors.Join(err, blob.Close())
}

// settle completes layer number n by the ones below it: hard links to files of
// a lower layer get a copy, which is what overlay itself would make; whiteouts
// that hide nothing go away; directories that the archive did not mention keep
// their attributes. The times of directories come last.
func (l *leftover) settle(dir string, n int) error {
	for _, k := range l.links {
		made, err := k.settle(dir, n)
		if err != nil {
			return fmt.Errorf("/%s: link to /%s: %w", k.name, k.target, err)
		}
		maps.Copy(l.implicit, made)
	}
	for _, name := range l.whiteouts {
		if err := dropIfIdle(dir, n, name); err != nil {
			return fmt.Errorf("/%s: whiteout: %w", name, err)
		}
	}
	for _, name := range slices.Sorted(maps.Keys(l.implicit)) {
		if err := inheritAttributes(dir, n, name); err != nil {
			return fmt.Errorf("/%s: %w", name, err)
		}
	}
	return l.setDirTimes(layerDir(dir, n))
}

func inheritAttributes(dir string, n int, name string) error {
	here, err := lookUp(layerDir(dir, n), name)
	if here == nil || err != nil {
		return err
	}
	defer here.close()
	below, err := findBelow(dir, n, name)
	if err != nil || here.kind() != unix.S_IFDIR {
		return err
	}
	if below == nil {
		// Of 1970, so that an image looks the same whenever it is unpacked.
		return setTime(here.parent, here.base, [2]unix.Timespec{})
	}
	defer below.close()
	if below.kind() != unix.S_IFDIR {
		return setTime(here.parent, here.base, [2]unix.Timespec{})
	}
	return copyAttributes(below, here.path())
}

// dropIfIdle removes a whiteout that has nothing to hide. In a directory that
// no lower layer has, overlay would list it (fs/overlayfs/readdir.c looks for
// whiteouts in merged directories only).
func dropIfIdle(dir string, n int, name string) error {
	here, err := lookUp(layerDir(dir, n), name)
	if here == nil || err != nil {
		return err
	}
	defer here.close()
	below, err := findBelow(dir, n, name)
	if err != nil {
		return err
	}
	if below != nil {
		below.close()
		return nil
	}
	if !isWhiteout(&here.st) {
		return nil
	}
	return unix.Unlinkat(here.parent, here.base, 0)
}

func layerDir(dir string, n int) string { return filepath.Join(dir, strconv.Itoa(n)) }

// lowerFile is a name in a layer, held by its directory.
type lowerFile struct {
	parent int // O_PATH
	base   string
	st     unix.Stat_t
}

func (f *lowerFile) close()       { _ = unix.Close(f.parent) } // an O_PATH descriptor
func (f *lowerFile) path() string { return procPath(f.parent, f.base) }
func (f *lowerFile) kind() uint32 { return f.st.Mode & unix.S_IFMT }

// findBelow returns what layer n would show of a name if it had nothing of
// that name itself; nil is nothing.
func findBelow(dir string, n int, name string) (*lowerFile, error) {
	for i := n; i >= 0; i-- {
		f, hides, err := walk(layerDir(dir, i), name)
		if err != nil {
			return nil, err
		}
		if f != nil && i < n {
			if !isWhiteout(&f.st) {
				return f, nil
			}
			hides = true
		}
		if f != nil {
			f.close()
		}
		if hides {
			return nil, nil
		}
	}
	return nil, nil
}

// lookUp finds a name in one layer; nil is nothing.
func lookUp(layer, name string) (*lowerFile, error) {
	f, _, err := walk(layer, name)
	return f, err
}

// walk goes down to a name in one layer without following links. hides tells
// whether the layer hides what layers below it have on the way.
func walk(layer, name string) (f *lowerFile, hides bool, err error) {
	at, err := unix.Open(layer, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, false, err
	}
	elements := strings.Split(name, "/")
	if name == "" {
		elements = []string{"."}
	}
	for i, base := range elements {
		f := &lowerFile{parent: at, base: base}
		err := unix.Fstatat(at, base, &f.st, unix.AT_SYMLINK_NOFOLLOW)
		if err == nil && i == len(elements)-1 {
			return f, hides, nil
		}
		hides = hides || err == nil && (f.kind() != unix.S_IFDIR || isOpaque(f.path()))
		next := -1
		if err == nil && f.kind() == unix.S_IFDIR {
			next, err = unix.Openat(at, base, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		}
		f.close()
		if errors.Is(err, unix.ENOENT) {
			return nil, hides, nil
		}
		if next < 0 || err != nil {
			return nil, hides, err
		}
		at = next
	}
	return nil, hides, nil
}

func isOpaque(path string) bool {
	var value [1]byte
	n, err := unix.Lgetxattr(path, opaqueXattr, value[:])
	return err == nil && n == 1 && value[0] == 'y'
}

// settle brings the target of a link into the link's own layer. It returns the
// directories that it made.
func (k link) settle(dir string, n int) (made map[string]struct{}, err error) {
	below, err := findBelow(dir, n, k.target)
	if err != nil {
		return nil, err
	}
	if below == nil {
		return nil, fmt.Errorf("no layer has that file: %w", fs.ErrNotExist)
	}
	defer below.close()
	if below.kind() != unix.S_IFREG {
		return nil, fmt.Errorf("it is in a lower layer and no regular file: %w", errors.ErrUnsupported)
	}
	e, err := newExtractor(context.Background(), layerDir(dir, n))
	if err != nil {
		return nil, err
	}
	defer e.close()
	parent, base, err := e.at(k.target)
	if err != nil {
		return nil, err
	}
	if err := copyFile(below, procPath(parent, base)); err != nil {
		return nil, err
	}
	return e.implicit, e.hardlink(k.name, k.target)
}

// copyFile copies a regular file with its attributes. A target that exists was
// copied for another link.
func copyFile(from *lowerFile, to string) error {
	in, err := os.Open(from.path())
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if errors.Is(err, fs.ErrExist) {
		return nil
	}
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	if err = errors.Join(err, out.Close()); err != nil {
		return err
	}
	return copyAttributes(from, to)
}

// copyAttributes is for regular files and directories.
func copyAttributes(from *lowerFile, to string) error {
	if err := os.Lchown(to, int(from.st.Uid), int(from.st.Gid)); err != nil {
		return err
	}
	if err := copyXattrs(from.path(), to); err != nil {
		return err
	}
	if err := unix.Chmod(to, from.st.Mode&0o7777); err != nil {
		return err
	}
	times := []unix.Timespec{from.st.Atim, from.st.Mtim}
	return unix.UtimesNanoAt(unix.AT_FDCWD, to, times, unix.AT_SYMLINK_NOFOLLOW)
}

func copyXattrs(from, to string) error {
	list := make([]byte, 64<<10) // XATTR_LIST_MAX
	n, err := unix.Llistxattr(from, list)
	if err != nil {
		return err
	}
	value := make([]byte, 64<<10) // XATTR_SIZE_MAX
	for name := range strings.SplitSeq(strings.TrimSuffix(string(list[:n]), "\x00"), "\x00") {
		if name == "" || strings.HasPrefix(name, overlayXattr) {
			continue
		}
		n, err := unix.Lgetxattr(from, name, value)
		if err != nil {
			return err
		}
		if err := unix.Lsetxattr(to, name, value[:n], 0); err != nil {
			return err
		}
	}
	return nil
}
