package unpack

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
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// copyBuffer is how much of a file is written at a time, and how long a run of
// zeros must be to become a hole, in bytes.
const copyBuffer = 128 << 10

// leftover is what is to be done when all layers are there: directories that
// have their attributes from a lower layer, links that lead there, whiteouts
// that may hide nothing, and the times of directories.
type leftover struct {
	implicit  map[string]struct{}
	links     []link
	whiteouts []string
	dirs      []dirTime
	size      int64 // of all files in bytes
}

type link struct{ name, target string }

// unpackLayer writes the files of one blob below dir, in the form that overlay
// expects of a lower directory, and checks size and digest of the blob, and its
// diffID unless that is "".
func unpackLayer(ctx context.Context, dir string, blob io.Reader, desc ocispec.Descriptor, diffID digest.Digest) (*leftover, error) {
	e, err := newExtractor(ctx, dir)
	if err != nil {
		return nil, err
	}
	defer e.close()
	e.buf, e.zeros = make([]byte, copyBuffer), make([]byte, copyBuffer)
	e.implicit[""] = struct{}{}
	sum, err := newVerifier(ctx, blob, desc)
	if err != nil {
		return nil, err
	}
	err = e.unpackBlob(sum, diffID)
	if errno := syscall.Errno(0); errors.As(err, &errno) || ctx.Err() != nil {
		return nil, err // ours, not the blob's
	}
	// When the bytes made no sense, which bytes came is the first question.
	if verr := sum.verify(); verr != nil {
		return nil, verr
	}
	return &e.leftover, err
}

// unpackBlob decompresses and unpacks r, and checks the digest of the plain bytes.
func (e *extractor) unpackBlob(r io.Reader, diffID digest.Digest) error {
	plain, err := Decompress(r)
	if err != nil {
		return fmt.Errorf("decompress: %w", err)
	}
	defer plain.Close()
	hashed := sha256.New()
	ahead := newReadAhead(io.TeeReader(plain, hashed))
	if err := errors.Join(e.unpack(ahead), ahead.Close()); err != nil {
		return err
	}
	if got := digest.NewDigest(digest.SHA256, hashed); diffID != "" && got != diffID {
		return fmt.Errorf("the plain bytes have digest %s, the image's config names %s: %w", got, diffID, errdefs.ErrDataLoss)
	}
	return nil
}

// unpack reads a tar stream to its very end.
func (e *extractor) unpack(r io.Reader) error {
	tr := tar.NewReader(r)
	for {
		hdr, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			return fmt.Errorf("read tar: %w", err)
		}
		if err := e.entry(hdr, tr); err != nil {
			return fmt.Errorf("/%s: %w", strings.TrimPrefix(hdr.Name, "/"), err)
		}
	}
	if _, err := io.Copy(io.Discard, r); err != nil {
		return fmt.Errorf("read behind the end of the archive: %w", err)
	}
	return nil
}

// whiteoutPrefix marks names that hide one of a lower layer (OCI image
// specification, layer.md, "Whiteouts").
const whiteoutPrefix = ".wh."

// entry applies one tar header.
func (e *extractor) entry(hdr *tar.Header, r io.Reader) error {
	// Cleaned as an absolute path, ".." cannot lead above the root.
	name := path.Clean("/" + hdr.Name)[1:]
	dir, base := path.Split(name)
	if hidden, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
		return e.whiteout(path.Clean("/" + dir)[1:], hidden)
	}
	if name == "" {
		if hdr.Typeflag != tar.TypeDir {
			return fmt.Errorf("the root is not a directory: %w", errdefs.ErrInvalidArgument)
		}
		return e.dir("", hdr)
	}
	switch hdr.Typeflag {
	case tar.TypeDir:
		return e.dir(name, hdr)
	case tar.TypeReg, tar.TypeGNUSparse:
		return e.file(name, hdr, r)
	case tar.TypeSymlink:
		return e.symlink(name, hdr)
	case tar.TypeLink:
		return e.hardlink(name, path.Clean("/" + hdr.Linkname)[1:])
	case tar.TypeChar, tar.TypeBlock, tar.TypeFifo:
		return e.node(name, hdr)
	case tar.TypeXGlobalHeader:
		return nil
	}
	return fmt.Errorf("tar entry of unknown type %q: %w", hdr.Typeflag, errdefs.ErrInvalidArgument)
}

// verifier passes a blob on and checks what has passed.
type verifier struct {
	ctx  context.Context
	r    io.Reader
	hash hash.Hash
	n    int64
	desc ocispec.Descriptor
}

func newVerifier(ctx context.Context, r io.Reader, desc ocispec.Descriptor) (*verifier, error) {
	if desc.Digest.Algorithm() != digest.SHA256 || desc.Digest.Validate() != nil {
		return nil, fmt.Errorf("digest %q is no sha256 digest: %w", desc.Digest, errdefs.ErrInvalidArgument)
	}
	return &verifier{ctx: ctx, r: r, hash: sha256.New(), desc: desc}, nil
}

func (v *verifier) Read(p []byte) (int, error) {
	if err := context.Cause(v.ctx); err != nil {
		return 0, err
	}
	n, err := v.r.Read(p)
	v.n += int64(n)
	if v.n > v.desc.Size {
		return n, fmt.Errorf("blob is longer than its %d bytes: %w", v.desc.Size, errdefs.ErrDataLoss)
	}
	_, _ = v.hash.Write(p[:n]) // never fails
	return n, err
}

// verify reads what is left and compares.
func (v *verifier) verify() error {
	if _, err := io.Copy(io.Discard, v); err != nil {
		return err
	}
	got := digest.NewDigest(digest.SHA256, v.hash)
	if got != v.desc.Digest || v.n != v.desc.Size {
		return fmt.Errorf("blob of %d bytes has digest %s, the manifest names %d bytes: %w", v.n, got, v.desc.Size, errdefs.ErrDataLoss)
	}
	return nil
}
