package registry

import (
	"bytes"
	"context"
	_ "crypto/sha256" // for go-digest
	_ "crypto/sha512" // digests of this algorithm are valid, too
	"encoding/json"
	"fmt"
	"io"
	"mime"
	"net/http"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// MaxManifest bounds manifests and indexes in bytes. The distribution
	// specification asks registries for at least 4 MiB.
	MaxManifest = 8 << 20
	// MaxBlob bounds what Repository.Blob reads into memory, in bytes. The
	// largest such blobs are indexes of images with millions of files.
	MaxBlob = 256 << 20
)

// Docker's media types, which registries hold beside those of OCI.
const (
	DockerManifest     = "application/vnd.docker.distribution.manifest.v2+json"
	DockerManifestList = "application/vnd.docker.distribution.manifest.list.v2+json"
)

// apiRoot is the path of the API at a registry (distribution specification,
// "Endpoints").
const apiRoot = "/v2"

// Repository is one repository of one registry. It has no state of its own;
// all methods may be called at the same time.
type Repository struct {
	client *Client
	link   *link  // nil: at several hosts, see each
	host   string // "host:port" to talk to
	scheme string
	root   string // path of the API
	ns     string // domain of the name when host is a mirror, or ""
	name   reference.Named
	last   bool // there is no other host to ask
}

// Name is the full name, domain included: "docker.io/library/debian".
func (r *Repository) Name() string { return r.name.Name() }

// Host is the "host:port" of the registry, which mirrors stand in for.
func (r *Repository) Host() string { return r.host }

func (r *Repository) path() string { return reference.Path(r.name) }

func manifestTypes() []string {
	return []string{ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, DockerManifestList, DockerManifest}
}

// Resolve asks what ref, a tag or a digest, means. It transfers no manifest
// when the registry tells the digest in a header.
func (r *Repository) Resolve(ctx context.Context, ref string) (desc ocispec.Descriptor, err error) {
	if err := r.checkRef(ref); err != nil {
		return ocispec.Descriptor{}, err
	}
	err = r.each(ctx, wanted(ref), func(one *Repository) (err error) {
		desc, err = one.resolve(ctx, ref)
		return err
	})
	return desc, err
}

// wanted is what a host must be able to do that is asked for a manifest.
func wanted(ref string) Capabilities {
	if _, err := digest.Parse(ref); err == nil {
		return CanPull
	}
	return CanPull | CanResolve
}

func (r *Repository) resolve(ctx context.Context, ref string) (ocispec.Descriptor, error) {
	q := query{method: http.MethodHead, kind: "manifests", ref: ref, accept: manifestTypes()}
	var header http.Header
	var size int64
	err := r.retry(ctx, func() error {
		resp, err := r.send(ctx, q, http.StatusOK)
		if err != nil {
			return err
		}
		header, size = resp.Header, resp.ContentLength
		return resp.Body.Close()
	})
	if errdefs.IsNotImplemented(err) { // no HEAD
		desc, _, err := r.GetManifest(ctx, ref)
		return desc, err
	}
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{
		MediaType: mediaType(header),
		Digest:    digest.Digest(header.Get("Docker-Content-Digest")),
		Size:      size,
	}
	if desc.Digest.Validate() != nil || size < 0 || !knownManifest(desc.MediaType) {
		desc, _, err = r.GetManifest(ctx, ref)
		return desc, err
	}
	if want, err := digest.Parse(ref); err == nil && want != desc.Digest {
		return ocispec.Descriptor{}, r.dataLoss(q.object(), "the registry answers with digest %s", desc.Digest)
	}
	return desc, nil
}

// GetManifest resolves ref, a tag or a digest, and reads the manifest or index
// in one exchange. The descriptor's digest is that of the bytes; it is checked
// against ref and against what the registry says it is.
func (r *Repository) GetManifest(ctx context.Context, ref string) (ocispec.Descriptor, []byte, error) {
	if err := r.checkRef(ref); err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	var desc ocispec.Descriptor
	var data []byte
	err := r.each(ctx, wanted(ref), func(one *Repository) error {
		return one.retry(ctx, func() (err error) {
			desc, data, err = one.getManifest(ctx, ref, digest.Canonical)
			return err
		})
	})
	return desc, data, err
}

func (r *Repository) getManifest(ctx context.Context, ref string, algorithm digest.Algorithm) (ocispec.Descriptor, []byte, error) {
	q := query{method: http.MethodGet, kind: "manifests", ref: ref, accept: manifestTypes()}
	resp, err := r.send(ctx, q, http.StatusOK)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	defer resp.Body.Close()
	data, err := r.readAll(q, resp.Body, MaxManifest)
	if err != nil {
		return ocispec.Descriptor{}, nil, err
	}
	told := digest.Digest(resp.Header.Get("Docker-Content-Digest"))
	if want, err := digest.Parse(ref); err == nil {
		told = want
	}
	if told.Validate() == nil {
		algorithm = told.Algorithm()
	} else {
		told = ""
	}
	desc := ocispec.Descriptor{MediaType: mediaType(resp.Header), Digest: algorithm.FromBytes(data), Size: int64(len(data))}
	if told != "" && desc.Digest != told {
		err := r.dataLoss(q.object(), "the manifest has digest %s, not %s", desc.Digest, told)
		r.wrong(err)
		return ocispec.Descriptor{}, nil, err
	}
	if !knownManifest(desc.MediaType) {
		desc.MediaType = sniff(data, desc.MediaType)
	}
	return desc, data, nil
}

// Manifest reads the manifest or index that desc names. A desc without size
// (0) takes any size up to MaxManifest.
func (r *Repository) Manifest(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	object := "manifest " + desc.Digest.String()
	if err := desc.Digest.Validate(); err != nil {
		return nil, r.fault(object, errdefs.ErrInvalidArgument, err)
	}
	if desc.Size < 0 || desc.Size > MaxManifest {
		return nil, r.fault(object, errdefs.ErrInvalidArgument, fmt.Errorf("a manifest of %d bytes is more than the %d that are read", desc.Size, int64(MaxManifest)))
	}
	_, data, err := r.GetManifest(ctx, desc.Digest.String())
	if err != nil {
		return nil, err
	}
	if desc.Size != 0 && desc.Size != int64(len(data)) {
		return nil, r.dataLoss(object, "the manifest has %d bytes, its descriptor says %d", len(data), desc.Size)
	}
	return data, nil
}

// Blob reads the whole blob that desc names, at most MaxBlob bytes, and checks
// its size and digest.
func (r *Repository) Blob(ctx context.Context, desc ocispec.Descriptor) (data []byte, err error) {
	err = r.each(ctx, CanPull, func(one *Repository) (err error) {
		data, err = one.blob(ctx, desc)
		return err
	})
	return data, err
}

func (r *Repository) blob(ctx context.Context, desc ocispec.Descriptor) ([]byte, error) {
	object := "blob " + desc.Digest.String()
	if desc.Size > MaxBlob {
		return nil, r.fault(object, errdefs.ErrInvalidArgument, fmt.Errorf("a blob of %d bytes is more than the %d that are read into memory", desc.Size, int64(MaxBlob)))
	}
	rc, err := r.Open(ctx, desc)
	if err != nil {
		return nil, err
	}
	defer rc.Close()
	// The buffer grows with what arrives, not with what a manifest claims.
	var data bytes.Buffer
	data.Grow(int(min(desc.Size, 1<<20)) + bytes.MinRead)
	if _, err := data.ReadFrom(rc); err != nil {
		return nil, err
	}
	if got := desc.Digest.Algorithm().FromBytes(data.Bytes()); got != desc.Digest {
		err := r.dataLoss(object, "its content has digest %s", got)
		r.wrong(err)
		return nil, err
	}
	return data.Bytes(), nil
}

// readAll reads the body of an answer to q, which may have limit bytes.
func (r *Repository) readAll(q query, body io.Reader, limit int64) ([]byte, error) {
	data, err := io.ReadAll(io.LimitReader(body, limit+1))
	if err != nil {
		return nil, r.bodyError(q.object(), err)
	}
	if int64(len(data)) > limit {
		return nil, r.fault(q.object(), errdefs.ErrInvalidArgument, fmt.Errorf("the answer is longer than %d bytes", limit))
	}
	return data, nil
}

// bodyError is what a body that did not arrive whole becomes.
func (r *Repository) bodyError(object string, err error) error {
	e := r.fault(object, errdefs.ErrUnavailable, fmt.Errorf("read the answer: %w", opaque(redact(err))))
	e.temporary = true
	e.Remedy = "is the connection to the registry stable?"
	return e
}

// checkRef accepts tags and digests, which are safe in a path.
func (r *Repository) checkRef(ref string) error {
	if _, err := digest.Parse(ref); err == nil {
		return nil
	}
	if _, err := reference.WithTag(r.name, ref); err != nil {
		return r.fault("manifest "+clean(ref), errdefs.ErrInvalidArgument, fmt.Errorf("this is neither a tag nor a digest"))
	}
	return nil
}

func mediaType(h http.Header) string {
	t, _, err := mime.ParseMediaType(h.Get("Content-Type"))
	if err != nil {
		return ""
	}
	return t
}

func knownManifest(t string) bool {
	switch t {
	case ocispec.MediaTypeImageIndex, ocispec.MediaTypeImageManifest, DockerManifestList, DockerManifest:
		return true
	}
	return false
}

// sniff takes the media type out of a manifest that was served as something
// else, as plain file servers do.
func sniff(data []byte, served string) string {
	var doc struct {
		MediaType string `json:"mediaType"`
	}
	if json.Unmarshal(data, &doc) != nil || doc.MediaType == "" {
		return served
	}
	return doc.MediaType
}
