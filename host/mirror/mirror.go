// Package mirror is a read-only OCI registry for the programs of the node itself, its
// containerd above all, which find it by hosts.toml: what one of them pulls, and what
// sandboxes read, is downloaded once.
//
//	GET|HEAD /v2/<name>/manifests/<digest or tag>
//	GET|HEAD /v2/<name>/blobs/<digest>             Range
//	GET|HEAD /v2/<name>/referrers/<digest>         ?artifactType=
//
// ?ns=<domain> says which registry the repository is of, as containerd's mirrors are
// told; without it the name begins with the domain.
//
// # Who may read what
//
// That something is on the node is no right to read it (KEP-2535). A caller may read
// an object when the registry, asked for it with a HEAD request that has exactly the
// caller's Authorization header, or none, answers 200. That is remembered for some
// minutes, in two parts: that the repository is open to who has this header, and
// that the object is in the repository; together they answer for further
// callers and objects. Where the registry sends the request elsewhere, that opens
// nothing: it may be a page to log in. A tag is always asked for. Any other answer goes back to the
// caller, so that its own client finds the token service in WWW-Authenticate and
// logs in there.
//
// What came from one registry is served for no other one, whatever that says to have.
//
// Whatever is downloaded for a caller is asked for with that header, too. The node's
// own credentials and client certificates are not used here: a registry that wants
// certificates has to be asked directly.
package mirror

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/host/blobs"
	"github.com/tatami-containers/tatami/host/ociserve"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// Config of a Mirror.
type Config struct {
	// Registry is a client without credentials, whose Hosts are those of Hosts.
	Registry *registry.Client
	Blobs    *blobs.Cache
	// Stall is how long a caller may take nothing of an answer; 30 s when 0.
	Stall time.Duration
	// Queue is what is waited for before bytes are sent; nil lets them pass.
	Queue *sched.Slots
	Log   *slog.Logger
}

// requests are how many are served at a time: containerd fetches 3 layers of an image
// at a time, and several images.
const requests = 64

// Mirror is the registry; its Serve and Shutdown are those of an ociserve.Server.
type Mirror struct {
	*ociserve.Server
	cfg    Config
	rights *rights
}

// New returns a Mirror. It serves nothing until Serve is called.
func New(cfg Config) *Mirror {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	m := &Mirror{cfg: cfg, rights: newRights(time.Now)}
	m.Server = ociserve.New(ociserve.Config{Answer: m.answer, Requests: requests, Stall: cfg.Stall, Queue: cfg.Queue, Log: cfg.Log})
	return m
}

// call is one request: what for, and with which rights.
type call struct {
	repo          *registry.Repository
	authorization string
	kind, ref     string
}

func (m *Mirror) answer(w http.ResponseWriter, req *http.Request) error {
	if done, err := ociserve.Check(w, req); done || err != nil {
		return err
	}
	name, kind, ref, err := ociserve.Split(req.URL.Path, ociserve.Manifests, ociserve.Blobs, ociserve.Referrers)
	if err != nil {
		return err
	}
	named, err := parse(req.URL.Query().Get("ns"), name)
	if err != nil {
		return err
	}
	if isMirror(localAddress(req), reference.Domain(named)) {
		return &ociserve.Failure{Status: http.StatusBadRequest, Code: "NAME_INVALID", Message: "this is the mirror itself, and no registry that it could ask"}
	}
	c := call{repo: m.cfg.Registry.Repository(named), authorization: req.Header.Get("Authorization"), kind: kind, ref: ref}
	if len(req.Header.Values("Authorization")) > 1 {
		return &ociserve.Failure{Status: http.StatusBadRequest, Code: "UNAUTHORIZED", Message: "give one Authorization header"}
	}
	req = req.WithContext(registry.WithCaller(req.Context(), c.authorization))
	switch kind {
	case ociserve.Referrers:
		return m.referrers(w, req, c)
	case ociserve.Blobs:
		return m.blob(w, req, c)
	}
	return m.manifest(w, req, c)
}

// localAddress is where the request came in, "127.0.0.1:5055".
func localAddress(req *http.Request) string {
	if a, ok := req.Context().Value(http.LocalAddrContextKey).(net.Addr); ok {
		return a.String()
	}
	return ""
}

// parse returns the repository of a name in a path, at the registry with this domain.
func parse(domain, name string) (reference.Named, error) {
	full := name
	if domain != "" {
		full = domain + "/" + name
	}
	named, err := reference.ParseNormalizedNamed(full)
	if err != nil || !reference.IsNameOnly(named) || domain != "" && reference.Domain(named) != domain ||
		domain == "" && named.Name() != name {
		return nil, &ociserve.Failure{Status: http.StatusBadRequest, Code: "NAME_INVALID",
			Message: "say which registry is meant: ?ns=<domain>, as containerd does, or a name that begins with its domain"}
	}
	return named, nil
}

func (m *Mirror) blob(w http.ResponseWriter, req *http.Request, c call) error {
	d, err := ociserve.ParseDigest(c.ref)
	if err != nil {
		return err
	}
	desc, err := m.allowed(req.Context(), c, d)
	if err != nil {
		return err
	}
	desc.MediaType = "application/octet-stream"
	return m.object(w, req, c, desc, blobOf{c})
}

func (m *Mirror) manifest(w http.ResponseWriter, req *http.Request, c call) error {
	d, err := digest.Parse(c.ref)
	var desc ocispec.Descriptor
	if err == nil {
		desc, err = m.allowed(req.Context(), c, d)
	} else {
		desc, err = m.ask(req.Context(), c)
	}
	if err != nil {
		return err
	}
	if desc.Digest == "" || desc.Size < 0 || desc.MediaType == "" {
		return m.untold(w, req, c)
	}
	return m.object(w, req, c, desc, manifestOf{c})
}

// untold answers for a manifest of which the registry tells too little before it is
// read.
func (m *Mirror) untold(w http.ResponseWriter, req *http.Request, c call) error {
	desc, data, err := c.repo.GetManifest(req.Context(), c.ref)
	if err != nil {
		return m.failed(req.Context(), c, err)
	}
	return m.Object(w, req, c.kind, desc, func(_ context.Context, off, n int64) (io.ReadCloser, error) {
		return section(data, off, n), nil
	})
}

// object sends what the cache has or gets.
func (m *Mirror) object(w http.ResponseWriter, req *http.Request, c call, desc ocispec.Descriptor, from blobs.Origin) error {
	err := m.Object(w, req, c.kind, desc, func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
		return m.cfg.Blobs.Open(ctx, from, desc, off, n)
	})
	return m.failed(req.Context(), c, err)
}

// failed turns an error of the registry into an answer. Where rights ended that were
// remembered, the registry says what the caller needs.
func (m *Mirror) failed(ctx context.Context, c call, err error) error {
	switch {
	case err == nil || ociserve.IsBroken(err):
		return err
	case errdefs.IsUnauthorized(err) || errdefs.IsPermissionDenied(err):
		m.rights.forget(c)
		if _, asked := m.ask(ctx, c); asked != nil {
			return asked
		}
	case errdefs.IsNotFound(err):
		return ociserve.Missing(c.kind, c.ref, notThere)
	}
	return err
}

const notThere = "is not in this repository"

func (m *Mirror) referrers(w http.ResponseWriter, req *http.Request, c call) error {
	d, err := ociserve.ParseDigest(c.ref)
	if err != nil {
		return err
	}
	filter := req.URL.Query().Get("artifactType")
	subject := c
	subject.kind = ociserve.Manifests
	_, err = m.allowed(req.Context(), subject, d)
	if absent(err) { // the specification wants an empty list
		return ociserve.List(w, nil, filter)
	}
	if err != nil {
		return err
	}
	list, err := c.repo.Referrers(req.Context(), d, filter)
	if err != nil {
		return m.failed(req.Context(), subject, err)
	}
	return ociserve.List(w, list, filter)
}

// blobOf is the repository as one caller reads its blobs. What he begins may go on
// for others after he has gone.
type blobOf struct{ call }

// Host implements blobs.Origin.
func (c call) Host() string { return c.repo.Host() }

// Open implements blobs.Origin.
func (o blobOf) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	return o.repo.Open(registry.WithCaller(ctx, o.authorization), desc)
}

// Range implements blobs.Origin.
func (o blobOf) Range(ctx context.Context, d digest.Digest, off, n int64) (io.ReadCloser, error) {
	return o.repo.Range(registry.WithCaller(ctx, o.authorization), d, off, n)
}

// manifestOf is the same for manifests, which are read whole.
type manifestOf struct{ call }

// Open implements blobs.Origin.
func (o manifestOf) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	data, err := o.repo.Manifest(registry.WithCaller(ctx, o.authorization), desc)
	if err != nil {
		return nil, err
	}
	return section(data, 0, int64(len(data))), nil
}

// Range implements blobs.Origin.
func (o manifestOf) Range(ctx context.Context, d digest.Digest, off, n int64) (io.ReadCloser, error) {
	data, err := o.repo.Manifest(registry.WithCaller(ctx, o.authorization), ocispec.Descriptor{Digest: d})
	if err != nil {
		return nil, err
	}
	if int64(len(data)) < off+n {
		return nil, fmt.Errorf("manifest %s has %d bytes: %w", d, len(data), errdefs.ErrDataLoss)
	}
	return section(data, off, n), nil
}
