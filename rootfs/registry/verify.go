package registry

import (
	"errors"
	"fmt"
	"hash"
	"io"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Verify passes r on and fails with errdefs.ErrDataLoss unless it has exactly
// the size and the digest of desc. The last bytes are given out only when the
// digest is right. Precondition: desc's digest is valid.
func Verify(r io.Reader, desc ocispec.Descriptor) io.Reader {
	return &verifier{r: r, desc: desc, hash: desc.Digest.Algorithm().Hash()}
}

type verifier struct {
	r    io.Reader
	desc ocispec.Descriptor
	hash hash.Hash
	n    int64 // bytes read
	good bool  // the digest was compared
}

func (v *verifier) Read(p []byte) (int, error) {
	n, err := v.r.Read(p)
	v.n += int64(n)
	if v.n > v.desc.Size {
		return 0, v.wrong("is longer than its %d bytes", v.desc.Size)
	}
	_, _ = v.hash.Write(p[:n]) // never fails
	if v.n == v.desc.Size && !v.good {
		if got := digest.NewDigest(v.desc.Digest.Algorithm(), v.hash); got != v.desc.Digest {
			return 0, v.wrong("has digest %s", got)
		}
		v.good = true
	}
	if errors.Is(err, io.EOF) && v.n < v.desc.Size {
		return n, v.wrong("ends after %d of %d bytes", v.n, v.desc.Size)
	}
	return n, err
}

func (v *verifier) wrong(format string, args ...any) error {
	return fmt.Errorf("blob %s %w: %w", v.desc.Digest, fmt.Errorf(format, args...), errdefs.ErrDataLoss)
}
