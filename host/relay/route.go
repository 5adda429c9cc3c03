package relay

import (
	"encoding/json"
	"fmt"
	"net/http"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// The path elements that name a kind of object.
const (
	manifests = "manifests"
	blobs     = "blobs"
	segments  = "segments"
	referrers = "referrers"
)

// maxPath bounds a request's path in bytes: a repository name has at most 255,
// a digest or tag at most 128.
const maxPath = 1024

func (r *Relay) route(w http.ResponseWriter, req *http.Request) error {
	if req.ContentLength != 0 {
		w.Header().Set("Connection", "close") // nobody reads that body
	}
	if req.Method != http.MethodGet && req.Method != http.MethodHead {
		w.Header().Set("Allow", "GET, HEAD")
		return &failure{http.StatusMethodNotAllowed, "UNSUPPORTED", "the relay is read-only"}
	}
	if req.ContentLength != 0 {
		return &failure{http.StatusBadRequest, "UNSUPPORTED", "a request has no body here"}
	}
	if req.URL.Path == "/v2/" || req.URL.Path == "/v2" {
		w.Header().Set("Content-Type", "application/json")
		_, err := w.Write([]byte("{}"))
		return broken(err)
	}
	name, kind, ref, err := split(req.URL.Path)
	if err != nil {
		return err
	}
	grants, err := r.granted(req.URL.Query().Get("ns"), name)
	if err != nil {
		return err
	}
	if kind == referrers {
		return r.referrers(w, req, grants, ref)
	}
	return r.object(w, req, grants, kind, ref)
}

// split takes /v2/<name>/<kind>/<ref> apart. A name may contain slashes.
func split(path string) (name, kind, ref string, err error) {
	unknown := &failure{http.StatusNotFound, "UNSUPPORTED", "no such path here: ask for /v2/<name>/{manifests,blobs,referrers,segments}/<digest>"}
	rest, ok := strings.CutPrefix(path, "/v2/")
	if !ok || len(path) > maxPath {
		return "", "", "", unknown
	}
	end := strings.LastIndexByte(rest, '/')
	if end < 0 {
		return "", "", "", unknown
	}
	rest, ref = rest[:end], rest[end+1:]
	if end = strings.LastIndexByte(rest, '/'); end < 0 {
		return "", "", "", unknown
	}
	name, kind = rest[:end], rest[end+1:]
	switch kind {
	case manifests, blobs, segments, referrers:
	default:
		return "", "", "", unknown
	}
	if name == "" || ref == "" {
		return "", "", "", unknown
	}
	return name, kind, ref, nil
}

// granted returns the grants of one repository. A repository that exists
// elsewhere on the node is refused like one that does not exist.
func (r *Relay) granted(domain, name string) ([]Grant, error) {
	var in []Grant
	for _, g := range r.cfg.Grants() {
		if g.Repository == name && (domain == "" || domain == g.Domain) {
			in = append(in, g)
		}
	}
	if len(in) == 0 {
		return nil, &failure{http.StatusForbidden, "DENIED",
			fmt.Sprintf("repository %q is not granted to this sandbox: the node adds it with a container that runs it", name)}
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
			return r.serve(w, req, g.Image, kind, desc)
		}
	}
	return missing(kind, ref)
}

// resolve returns the digest that ref is, or that it is the tag of.
func resolve(grants []Grant, kind, ref string) (digest.Digest, error) {
	if d, err := digest.Parse(ref); err == nil {
		return d, nil
	}
	if kind != manifests || strings.ContainsRune(ref, ':') {
		return "", &failure{http.StatusBadRequest, "DIGEST_INVALID", fmt.Sprintf("%q is not a digest", ref)}
	}
	for _, g := range grants {
		if g.Tag == ref {
			return g.Manifest, nil
		}
	}
	return "", missing(kind, ref)
}

// missing says that an object is in none of the grants.
func missing(kind, ref string) error {
	code := "BLOB_UNKNOWN"
	if kind == manifests || kind == referrers {
		code = "MANIFEST_UNKNOWN"
	}
	return &failure{http.StatusNotFound, code,
		fmt.Sprintf("%s/%s belongs to no image that is granted to this sandbox in this repository", kind, ref)}
}

// referrers lists the artifacts of one image as an image index.
func (r *Relay) referrers(w http.ResponseWriter, req *http.Request, grants []Grant, ref string) error {
	d, err := resolve(nil, referrers, ref)
	if err != nil {
		return err
	}
	for _, g := range grants {
		if g.Manifest == d {
			return list(w, g.Image.Referrers(), req.URL.Query().Get("artifactType"))
		}
	}
	return missing(referrers, ref)
}

func list(w http.ResponseWriter, all []ocispec.Descriptor, artifactType string) error {
	answer := ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageIndex,
		Manifests: []ocispec.Descriptor{},
	}
	for _, desc := range all {
		if artifactType == "" || artifactType == desc.ArtifactType {
			answer.Manifests = append(answer.Manifests, desc)
		}
	}
	body, err := json.Marshal(answer)
	if err != nil {
		return fmt.Errorf("encode referrers: %w", err)
	}
	w.Header().Set("Content-Type", ocispec.MediaTypeImageIndex)
	if artifactType != "" {
		w.Header().Set("OCI-Filters-Applied", "artifactType")
	}
	_, err = w.Write(body)
	return broken(err)
}
