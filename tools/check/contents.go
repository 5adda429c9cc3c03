package check

import (
	"archive/tar"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"hash"
	"io"
	"path"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/formats"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer/tarball"
	"github.com/tatami-containers/tatami/rootfs/unpack"
)

// contents is what a tar has, by cleaned name; of equal names the last counts.
type contents struct {
	files map[string]file
}

// file is one entry of a tar.
type file struct {
	kind         byte // a tar type flag
	mode         int64
	uid, gid     int
	time         time.Time
	link         string
	major, minor int64
	xattrs       []index.Xattr
	size         int64
	sum          [sha256.Size]byte // of the content
}

// read reads a layer with the standard library and other decompressors than
// those of a node. The blob's digest is checked by the source.
func (c *checker) read(ctx context.Context, l formats.Layer) (*contents, digest.Digest, error) {
	body, err := c.src.Open(ctx, l.Descriptor)
	if err != nil {
		return nil, "", err
	}
	defer body.Close()
	job := c.progress.Start("unpack "+l.Digest.Encoded()[:12], l.Size)
	defer job.Done("")
	plain, err := unpack.Decompress(&told{body, job.Add})
	if err != nil {
		return nil, "", err
	}
	defer plain.Close()
	digester := l.DiffID.Algorithm().Digester()
	stream := io.TeeReader(plain, digester.Hash())
	out, err := readTar(stream)
	if err != nil {
		return nil, "", err
	}
	// What follows the end of the tar counts for the digests.
	if _, err := io.Copy(io.Discard, stream); err != nil {
		return nil, "", err
	}
	if _, err := io.Copy(io.Discard, body); err != nil {
		return nil, "", err
	}
	return out, digester.Digest(), nil
}

func readTar(r io.Reader) (*contents, error) {
	out := &contents{files: map[string]file{}}
	t := tar.NewReader(r)
	sum := sha256.New()
	for {
		h, err := t.Next()
		if errors.Is(err, io.EOF) {
			return out, nil
		}
		if err != nil {
			return nil, fmt.Errorf("read the layer as a tar: %w", err)
		}
		if err := out.add(t, h, sum); err != nil {
			return nil, fmt.Errorf("read %q in the layer: %w", h.Name, err)
		}
	}
}

func (c *contents) add(t *tar.Reader, h *tar.Header, sum hash.Hash) error {
	name := clean(h.Name)
	if h.Typeflag == tar.TypeXGlobalHeader {
		return nil
	}
	f := file{
		kind: h.Typeflag, mode: h.Mode & 0o7777, uid: h.Uid, gid: h.Gid, time: h.ModTime,
		link: h.Linkname, major: h.Devmajor, minor: h.Devminor,
	}
	switch h.Typeflag {
	case tar.TypeReg, tar.TypeGNUSparse:
		f.kind = tar.TypeReg
		sum.Reset()
		n, err := io.Copy(sum, t)
		if err != nil {
			return err
		}
		f.size = n
		sum.Sum(f.sum[:0])
	case tar.TypeLink:
		f = file{kind: tar.TypeLink, link: clean(h.Linkname)}
	}
	if f.kind != tar.TypeLink {
		var err error
		if f.xattrs, err = tarball.Xattrs(h.PAXRecords); err != nil {
			return err
		}
	}
	c.files[name] = f
	return nil
}

// clean makes a name of a tar relative to the root, which is "".
func clean(name string) string {
	return strings.TrimPrefix(path.Clean("/"+name), "/")
}

// optional says whether a name is not of the image, so that an index may leave
// it out: what lazy formats add to their layers, and the metadata of aufs.
func optional(name string) bool {
	switch name {
	case "stargz.index.json", ".prefetch.landmark", ".no.prefetch.landmark":
		return true
	}
	first, _, _ := strings.Cut(name, "/")
	return strings.HasPrefix(first, ".wh..wh.") && first != ".wh..wh..opq"
}

// told tells what is read.
type told struct {
	io.Reader
	tell func(int64)
}

func (t *told) Read(p []byte) (int, error) {
	n, err := t.Reader.Read(p)
	t.tell(int64(n))
	return n, err
}
