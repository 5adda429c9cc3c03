package registry

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// A subject with more referrers than this is read up to here.
const (
	maxReferrerPages = 16
	maxReferrers     = 4096
)

// Referrers lists the manifests whose subject is dgst, with this artifactType,
// or all of them when it is empty. A registry without the referrers API is
// asked for the tag that stands in for it (distribution specification,
// "Referrers Tag Schema"). None is an empty list, not an error. That a mirror
// has none proves nothing: a proxy cache that does not pass the request on
// says so, too (Harbor).
func (r *Repository) Referrers(ctx context.Context, dgst digest.Digest, artifactType string) ([]ocispec.Descriptor, error) {
	if err := dgst.Validate(); err != nil {
		return nil, r.fault("referrers of "+clean(dgst.String()), errdefs.ErrInvalidArgument, err)
	}
	var list []ocispec.Descriptor
	err := r.each(ctx, CanPull|CanReferrers, func(one *Repository) (err error) {
		list, err = one.referrers(ctx, dgst, artifactType)
		if err == nil && len(list) == 0 && !one.last {
			return r.fault("referrers of "+dgst.String(), errdefs.ErrNotFound, errors.New("the mirror has none"))
		}
		return err
	})
	if err != nil {
		return nil, err
	}
	// A registry need not filter (it says so in OCI-Filters-Applied).
	return slices.DeleteFunc(list, func(d ocispec.Descriptor) bool {
		return artifactType != "" && d.ArtifactType != artifactType
	}), nil
}

func (r *Repository) referrers(ctx context.Context, dgst digest.Digest, artifactType string) ([]ocispec.Descriptor, error) {
	list, err := r.listReferrers(ctx, dgst, artifactType)
	if errdefs.IsNotFound(err) || errdefs.IsNotImplemented(err) || errdefs.IsInvalidArgument(err) {
		return r.taggedReferrers(ctx, dgst)
	}
	return list, err
}

func (r *Repository) listReferrers(ctx context.Context, dgst digest.Digest, artifactType string) ([]ocispec.Descriptor, error) {
	q := query{method: http.MethodGet, kind: "referrers", ref: dgst.String(), accept: []string{ocispec.MediaTypeImageIndex}}
	if artifactType != "" {
		q.values = url.Values{"artifactType": {artifactType}}
	}
	var list []ocispec.Descriptor
	for range maxReferrerPages {
		page, next, err := r.referrersPage(ctx, q)
		if err != nil {
			return nil, err
		}
		list = append(list, page...)
		if next == nil || len(list) >= maxReferrers {
			break
		}
		q.values = next
	}
	return list[:min(len(list), maxReferrers)], nil
}

// referrersPage reads one page; next is the query of the following one, or nil.
func (r *Repository) referrersPage(ctx context.Context, q query) (page []ocispec.Descriptor, next url.Values, err error) {
	err = r.retry(ctx, func() error {
		resp, err := r.send(ctx, q, http.StatusOK)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		if t := mediaType(resp.Header); t != ocispec.MediaTypeImageIndex {
			// Registries without the API have been seen to answer 200 with a page of their own.
			return r.fault(q.object(), errdefs.ErrNotImplemented, fmt.Errorf("the answer is of type %q", clean(t)))
		}
		data, err := r.readAll(q, resp.Body, MaxManifest)
		if err != nil {
			return err
		}
		if page, err = decodeReferrers(data); err != nil {
			return r.dataLoss(q.object(), "decode the list: %w", err)
		}
		next = nextPage(resp.Header.Get("Link"))
		return nil
	})
	return page, next, err
}

// taggedReferrers reads the index behind the tag that stands in for the API.
func (r *Repository) taggedReferrers(ctx context.Context, dgst digest.Digest) ([]ocispec.Descriptor, error) {
	tag := referrersTag(dgst)
	desc, data, err := r.GetManifest(ctx, tag)
	if errdefs.IsNotFound(err) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	if desc.MediaType != ocispec.MediaTypeImageIndex {
		return nil, r.dataLoss("manifest "+tag, "a list of referrers has media type %q", clean(desc.MediaType))
	}
	list, err := decodeReferrers(data)
	if err != nil {
		return nil, r.dataLoss("manifest "+tag, "decode the list of referrers: %w", err)
	}
	return list[:min(len(list), maxReferrers)], nil
}

// referrersTag is the tag that stands in for the API, cut to what a tag may be long.
func referrersTag(dgst digest.Digest) string {
	return fmt.Sprintf("%.32s-%.64s", dgst.Algorithm(), dgst.Encoded())
}

// decodeReferrers returns the usable descriptors of an index.
func decodeReferrers(data []byte) ([]ocispec.Descriptor, error) {
	var doc ocispec.Index
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, err
	}
	return slices.DeleteFunc(doc.Manifests, func(d ocispec.Descriptor) bool {
		return d.Digest.Validate() != nil || d.Size <= 0 || d.Size > MaxManifest
	}), nil
}

// nextPage returns the query of the page that a Link header (RFC 8288) calls
// next. Only the query counts: the request goes to where the last one went,
// whatever host and path the link has.
func nextPage(link string) url.Values {
	for _, l := range strings.Split(link, ",") {
		target, params, ok := strings.Cut(strings.TrimSpace(l), ">")
		if !ok || !strings.HasPrefix(target, "<") || !relNext(params) {
			continue
		}
		u, err := url.Parse(target[1:])
		if err != nil || u.RawQuery == "" {
			return nil
		}
		return u.Query()
	}
	return nil
}

func relNext(params string) bool {
	for _, p := range strings.Split(params, ";") {
		if name, value, ok := strings.Cut(strings.TrimSpace(p), "="); ok && strings.EqualFold(name, "rel") {
			return strings.EqualFold(strings.Trim(value, `"`), "next")
		}
	}
	return false
}
