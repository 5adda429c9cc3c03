package registry

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// octets is the media type of what is uploaded.
const octets = "application/octet-stream"

// Has tells whether the repository has the manifest or blob that desc names.
// It asks with a token that allows to push, as what follows needs one.
func (r *Repository) Has(ctx context.Context, desc ocispec.Descriptor) (bool, error) {
	r, err := r.one(CanPush)
	if err != nil {
		return false, err
	}
	q := query{kind: "blobs", ref: desc.Digest.String()}
	w := write{method: http.MethodHead}
	if knownManifest(desc.MediaType) {
		q.kind, w.accept = "manifests", []string{desc.MediaType}
	}
	w.object = q.object()
	if err := desc.Digest.Validate(); err != nil {
		return false, r.fault(w.object, errdefs.ErrInvalidArgument, err)
	}
	w.address = r.origin(q)
	err = r.retry(ctx, func() error {
		resp, err := r.write(ctx, w, http.StatusOK)
		if err != nil {
			return err
		}
		return resp.Body.Close()
	})
	if errdefs.IsNotFound(err) {
		return false, nil
	}
	return err == nil, err
}

// PushBlob uploads the blob that desc names from src, in one request that
// streams. What has not the size and digest of desc does not get into the
// registry. Failures that may pass are tried again when src is an io.Seeker.
func (r *Repository) PushBlob(ctx context.Context, desc ocispec.Descriptor, src io.Reader) error {
	object := "blob " + desc.Digest.String()
	if err := desc.Digest.Validate(); err != nil {
		return r.fault(object, errdefs.ErrInvalidArgument, err)
	}
	if desc.Size < 0 {
		return r.fault(object, errdefs.ErrInvalidArgument, fmt.Errorf("a size of %d bytes", desc.Size))
	}
	r, err := r.one(CanPush)
	if err != nil {
		return err
	}
	return r.rewinding(ctx, src, func(src io.Reader) error {
		s, err := r.beginUpload(ctx, object)
		if err != nil {
			return err
		}
		return r.finishUpload(ctx, s, desc, Verify(src, desc))
	})
}

// PushStream uploads a blob whose size and digest are known only at its end,
// and returns its descriptor. Memory and retries are those of PushBlob.
func (r *Repository) PushStream(ctx context.Context, mediaType string, src io.Reader) (ocispec.Descriptor, error) {
	r, err := r.one(CanPush)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType}
	err = r.rewinding(ctx, src, func(src io.Reader) error {
		s, err := r.beginUpload(ctx, "new blob")
		if err != nil {
			return err
		}
		sum := digest.Canonical.Digester()
		n := &counter{r: io.TeeReader(src, sum.Hash())}
		if s, err = r.streamUpload(ctx, s, n); err != nil {
			return err
		}
		desc.Digest, desc.Size = sum.Digest(), n.n
		return r.finishUpload(ctx, s, desc, nil)
	})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	return desc, nil
}

// MountBlob makes a blob of another repository of the same registry one of
// this repository, without sending it. It is false when the registry does not
// do that, or does not have the blob there.
func (r *Repository) MountBlob(ctx context.Context, desc ocispec.Descriptor, from *Repository) (bool, error) {
	object := "blob " + desc.Digest.String()
	if err := desc.Digest.Validate(); err != nil {
		return false, r.fault(object, errdefs.ErrInvalidArgument, err)
	}
	r, err := r.one(CanPush)
	if err != nil {
		return false, err
	}
	if from, err = from.one(CanPull); err != nil {
		return false, err
	}
	if from.host != r.host || from.ns != r.ns || from.path() == r.path() {
		return false, nil
	}
	w := write{method: http.MethodPost, object: object, from: from.name, address: r.origin(query{
		kind: "blobs", ref: "uploads/",
		values: url.Values{"mount": {desc.Digest.String()}, "from": {from.path()}},
	})}
	mounted := false
	err = r.retry(ctx, func() error {
		// 202 is the begin of an upload; registries drop those that nobody goes on with.
		resp, err := r.write(ctx, w, http.StatusCreated, http.StatusAccepted)
		if err != nil {
			return err
		}
		mounted = resp.StatusCode == http.StatusCreated
		return resp.Body.Close()
	})
	return mounted, err
}

// rewinding calls push, and again after a failure that may pass if src can
// give its bytes again or has given none.
func (r *Repository) rewinding(ctx context.Context, src io.Reader, push func(io.Reader) error) error {
	seeker, _ := src.(io.Seeker)
	var start int64
	if seeker != nil {
		var err error
		if start, err = seeker.Seek(0, io.SeekCurrent); err != nil {
			seeker = nil // a pipe, for one
		}
	}
	var failed error // of src: no use in trying again
	err := r.retry(ctx, func() error {
		n := &counter{r: src}
		err := push(n)
		var source *sourceError
		if errors.As(err, &source) {
			failed = fmt.Errorf("read what is to be pushed to %s at registry %s: %w", r.Name(), r.host, source.err)
			return nil
		}
		if err == nil || n.n == 0 {
			return err
		}
		if seeker == nil {
			return final(err)
		}
		if _, serr := seeker.Seek(start, io.SeekStart); serr != nil {
			return errors.Join(final(err), serr)
		}
		return err
	})
	return cmp.Or(err, failed)
}

// final makes err one that is not tried again.
func final(err error) error {
	var e *Error
	if errors.As(err, &e) {
		e.temporary, e.stale = false, false
	}
	return err
}

// counter counts the bytes that were read.
type counter struct {
	r io.Reader
	n int64
}

func (c *counter) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}

// session is an upload that has begun (distribution specification, "Pushing
// blobs"). Its address may hold a secret.
type session struct {
	address       *url.URL
	object        string
	authorization string // header that the registry accepted; a stream cannot be sent twice for a challenge
}

func (r *Repository) beginUpload(ctx context.Context, object string) (session, error) {
	w := write{method: http.MethodPost, object: object, address: r.origin(query{kind: "blobs", ref: "uploads/"})}
	resp, err := r.write(ctx, w, http.StatusAccepted)
	if err != nil {
		return session{}, err
	}
	defer resp.Body.Close()
	s := session{object: object}
	if r.own(resp.Request.URL) {
		s.authorization = resp.Request.Header.Get("Authorization")
	}
	return r.follow(s, resp)
}

// follow returns the session as the answer's Location has it.
func (r *Repository) follow(s session, resp *http.Response) (session, error) {
	next, err := resp.Location()
	if err != nil {
		return s, r.fault(s.object, errdefs.ErrUnavailable, errors.New("the registry does not say where an upload goes on"))
	}
	s.address = next
	return s, nil
}

// streamUpload sends a body of unknown length, as docker push does.
func (r *Repository) streamUpload(ctx context.Context, s session, src io.Reader) (session, error) {
	resp, err := r.write(ctx, write{
		method: http.MethodPatch, address: s.address, object: s.object, session: true, authorization: s.authorization,
		mediaType: octets, stream: src, size: -1,
	}, http.StatusAccepted, http.StatusNoContent)
	if err != nil {
		return s, err
	}
	defer resp.Body.Close()
	return r.follow(s, resp)
}

// finishUpload sends the blob, or with a nil src nothing more, and closes the session.
func (r *Repository) finishUpload(ctx context.Context, s session, desc ocispec.Descriptor, src io.Reader) error {
	w := write{
		method: http.MethodPut, object: s.object, session: true, authorization: s.authorization,
		mediaType: octets, stream: src, size: desc.Size,
	}
	if src != nil && desc.Size == 0 {
		// net/http takes a body of length 0 for one of unknown length.
		if _, err := io.Copy(io.Discard, src); err != nil {
			return &sourceError{err}
		}
		w.stream = nil
	}
	address := *s.address
	values := address.Query()
	values.Set("digest", desc.Digest.String())
	address.RawQuery = values.Encode()
	w.address = &address
	resp, err := r.write(ctx, w, http.StatusCreated, http.StatusNoContent)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	told := digest.Digest(resp.Header.Get("Docker-Content-Digest"))
	if told.Validate() == nil && told.Algorithm() == desc.Digest.Algorithm() && told != desc.Digest {
		return r.dataLoss("blob "+desc.Digest.String(), "the registry has stored digest %s", told)
	}
	return nil
}
