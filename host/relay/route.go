package relay

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/host/ociserve"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// notGranted is why an object is missing.
const notGranted = "belongs to no image that is granted to this sandbox in this repository"

func (r *Relay) answer(w http.ResponseWriter, req *http.Request) error {
	if done, err := ociserve.Check(w, req); done || err != nil {
		return err
	}
	name, kind, ref, err := ociserve.Split(req.URL.Path, ociserve.Manifests, ociserve.Blobs, ociserve.Referrers, ociserve.Segments)
	if err != nil {
		return err
	}
	grants, err := r.granted(req.URL.Query().Get("ns"), name)
	if err != nil {
		return err
	}
	if kind == ociserve.Referrers {
		return referrers(w, req, grants, ref)
	}
	return r.object(w, req, grants, kind, ref)
}

// granted returns the grants of one repository. A repository that exists
// elsewhere on the node is refused like one that does not exist.
func (r *Relay) granted(domain, name string) ([]Grant, error) {
	var in []Grant
	for _, g := range r.grants() {
		if g.Repository == name && (domain == "" || domain == g.Domain) {
			in = append(in, g)
		}
	}
	if len(in) == 0 {
		return nil, &ociserve.Failure{Status: http.StatusForbidden, Code: "DENIED",
			Message: fmt.Sprintf("repository %q is not granted to this sandbox: the node adds it with a container that runs it", name)}
	}
	return in, nil
}

// object answers for a manifest, a blob or a segment.
func (r *Relay) object(w http.ResponseWriter, req *http.Request, grants []Grant, kind, ref string) error {
	d, err := resolve(grants, kind, ref)
	if err != nil {
		return err
	}
	for _, g := range grants {
		if desc, ok := g.Image.Find(kind, d); ok {
			return r.Object(w, req.WithContext(g.work(req.Context())), kind, desc, func(ctx context.Context, off, n int64) (io.ReadCloser, error) {
				return g.Image.Open(ctx, kind, d, off, n)
			})
		}
	}
	return ociserve.Missing(kind, ref, notGranted)
}

// work returns a context of the work for one request, which is for whom the image was
// granted.
func (g *Grant) work(ctx context.Context) context.Context {
	return sched.With(ctx, sched.NewWork(sched.Standing{Flow: g.Flow, Rank: sched.RankOf(ctx)}))
}

// resolve returns the digest that ref is, or that it is the tag of.
func resolve(grants []Grant, kind, ref string) (digest.Digest, error) {
	if kind != ociserve.Manifests || strings.ContainsRune(ref, ':') {
		return ociserve.ParseDigest(ref)
	}
	for _, g := range grants {
		if g.Tag == ref {
			return g.Manifest, nil
		}
	}
	return "", ociserve.Missing(kind, ref, notGranted)
}

// referrers lists the artifacts of one image as an image index. Of anything else there
// are none; the specification wants no 404 here.
func referrers(w http.ResponseWriter, req *http.Request, grants []Grant, ref string) error {
	d, err := ociserve.ParseDigest(ref)
	if err != nil {
		return err
	}
	var list []ocispec.Descriptor
	for _, g := range grants {
		if g.Manifest == d {
			list = g.Image.Referrers()
			break
		}
	}
	return ociserve.List(w, list, req.URL.Query().Get("artifactType"))
}
