package mirror

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"io"
	"net/http"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/host/ociserve"
	"github.com/tatami-containers/tatami/rootfs/registry"
)

const (
	// remembered is for how long the registry is not asked again whether a caller may
	// read a repository: as long as the tokens of most registries are valid.
	remembered = 5 * time.Minute
	// thereFor is for how long an object is taken to be in a repository.
	thereFor = time.Hour
	// maxRights bounds each of the two tables; a full one starts again empty.
	maxRights = 16 << 10
)

// rights is what registries have said.
type rights struct {
	now func() time.Time

	mu      sync.Mutex
	open    map[holder]time.Time // until when; protected by mu
	objects map[object]there     // protected by mu
}

// holder is a repository and the hash of an Authorization header: secrets are not
// kept.
type holder struct {
	repository string
	header     [sha256.Size]byte
}

type object struct {
	repository, kind string
	digest           digest.Digest
}

type there struct {
	desc  ocispec.Descriptor
	until time.Time
}

func newRights(now func() time.Time) *rights {
	return &rights{now: now, open: map[holder]time.Time{}, objects: map[object]there{}}
}

func (c call) holder() holder {
	return holder{c.repo.Name(), sha256.Sum256([]byte(c.authorization))}
}

// find returns what is known of an object that the caller may read.
func (r *rights) find(c call, d digest.Digest) (ocispec.Descriptor, bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	now := r.now()
	known := r.objects[object{c.repo.Name(), c.kind, d}]
	return known.desc, now.Before(r.open[c.holder()]) && now.Before(known.until)
}

// note remembers that the caller was given an object. An answer from elsewhere opens
// nothing, and says of an object only to whom the repository is open already.
func (r *rights) note(c call, a registry.Answer) {
	r.mu.Lock()
	defer r.mu.Unlock()
	if a.Redirected && !r.now().Before(r.open[c.holder()]) {
		return
	}
	if len(r.open) >= maxRights {
		clear(r.open)
	}
	if len(r.objects) >= maxRights {
		clear(r.objects)
	}
	if !a.Redirected {
		r.open[c.holder()] = r.now().Add(remembered)
	}
	if d := a.Descriptor.Digest; d != "" {
		r.objects[object{c.repo.Name(), c.kind, d}] = there{a.Descriptor, r.now().Add(thereFor)}
	}
}

// forget takes back what is known of the caller.
func (r *rights) forget(c call) {
	r.mu.Lock()
	defer r.mu.Unlock()
	delete(r.open, c.holder())
}

// allowed describes an object that the caller may read; else the error is the answer.
func (m *Mirror) allowed(ctx context.Context, c call, d digest.Digest) (ocispec.Descriptor, error) {
	if desc, ok := m.rights.find(c, d); ok {
		return desc, nil
	}
	return m.ask(ctx, c)
}

// ask asks the registry whether the caller may read an object, and describes it.
func (m *Mirror) ask(ctx context.Context, c call) (ocispec.Descriptor, error) {
	a, err := c.repo.Head(ctx, c.kind, c.ref)
	if errdefs.IsInvalidArgument(err) { // neither a tag nor a digest
		return ocispec.Descriptor{}, ociserve.Missing(c.kind, c.ref, notThere)
	}
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if a.Status != http.StatusOK {
		return ocispec.Descriptor{}, refusal(c, a.Status, a.Header)
	}
	if c.kind == ociserve.Blobs && a.Descriptor.Size < 0 {
		return ocispec.Descriptor{}, &ociserve.Failure{Status: http.StatusBadGateway, Code: "UNKNOWN", Message: "the registry does not tell the blob's size: ask it directly"}
	}
	m.rights.note(c, a)
	return a.Descriptor, nil
}

// refusal is the registry's answer, for the caller. Of a server that fails or answers
// in another way than a registry should, the caller is told that the mirror cannot
// help: its client asks the next host.
func refusal(c call, status int, header http.Header) error {
	f := &ociserve.Failure{Status: status, Header: header}
	switch status {
	case http.StatusUnauthorized:
		f.Code, f.Message = "UNAUTHORIZED", "the registry wants a login"
	case http.StatusForbidden:
		f.Code, f.Message = "DENIED", "the registry refuses this login"
	case http.StatusTooManyRequests:
		f.Code, f.Message = "TOOMANYREQUESTS", "the registry limits requests"
	case http.StatusNotFound:
		return ociserve.Missing(c.kind, c.ref, notThere)
	default:
		f.Status, f.Code, f.Message = http.StatusBadGateway, "UNKNOWN", "the registry does not answer this: try it directly"
	}
	return f
}

// absent tells whether the registry does not have what was asked for.
func absent(err error) bool {
	var f *ociserve.Failure
	return errors.As(err, &f) && f.Status == http.StatusNotFound
}

// section reads a part of data.
func section(data []byte, off, n int64) io.ReadCloser {
	return io.NopCloser(bytes.NewReader(data[off : off+n]))
}
