package registry

import (
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// PushManifest stores a manifest or index byte for byte, under a tag or, when
// tag is "", under its digest alone. All that it names must be there. One with
// a subject becomes a referrer of it; where the registry has no referrers API,
// it is added to the tag that stands in for it.
func (r *Repository) PushManifest(ctx context.Context, mediaType string, data []byte, tag string) (ocispec.Descriptor, error) {
	r, err := r.one(CanPush)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	desc := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
	q := query{kind: "manifests", ref: cmp.Or(tag, desc.Digest.String())}
	if err := r.checkRef(q.ref); err != nil {
		return ocispec.Descriptor{}, err
	}
	if desc.Size > MaxManifest {
		return ocispec.Descriptor{}, r.fault(q.object(), errdefs.ErrInvalidArgument, fmt.Errorf("a manifest of %d bytes is more than the %d that are read", desc.Size, int64(MaxManifest)))
	}
	w := write{method: http.MethodPut, address: r.origin(q), object: q.object(), mediaType: mediaType, data: data}
	known := false // to the referrers API
	err = r.retry(ctx, func() error {
		resp, err := r.write(ctx, w, http.StatusCreated, http.StatusOK)
		if err != nil {
			return err
		}
		defer resp.Body.Close()
		known = resp.Header.Get("OCI-Subject") != ""
		if told := digest.Digest(resp.Header.Get("Docker-Content-Digest")); told.Validate() == nil && told != desc.Digest {
			return r.dataLoss(q.object(), "the registry has stored digest %s, not %s", told, desc.Digest)
		}
		return nil
	})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	if subject, listed := Referrer(desc, data); subject != "" && !known {
		if err := r.tagReferrer(ctx, subject, listed); err != nil {
			return ocispec.Descriptor{}, err
		}
	}
	return desc, nil
}

// Referrer returns the digest of a manifest's subject, or "", and the manifest's
// descriptor as a list of referrers has it (distribution specification,
// "Listing Referrers").
func Referrer(desc ocispec.Descriptor, data []byte) (subject digest.Digest, listed ocispec.Descriptor) {
	var doc ocispec.Manifest
	if json.Unmarshal(data, &doc) != nil || doc.Subject == nil || doc.Subject.Digest.Validate() != nil {
		return "", desc
	}
	desc.ArtifactType, desc.Annotations = doc.ArtifactType, doc.Annotations
	if desc.ArtifactType == "" && desc.MediaType == ocispec.MediaTypeImageManifest {
		desc.ArtifactType = doc.Config.MediaType
	}
	return doc.Subject.Digest, desc
}

// referrerTries bounds how often a list of referrers is written, when others
// write it at the same time.
const referrerTries = 4

// tagReferrer adds listed to the index behind the tag that stands in for the
// referrers API (distribution specification, "Referrers Tag Schema"). One client
// writes one list at a time. Another that writes the tag at the same time may
// undo that, so the index is read again.
func (r *Repository) tagReferrer(ctx context.Context, subject digest.Digest, listed ocispec.Descriptor) error {
	select {
	case r.client.tagging <- struct{}{}:
		defer func() { <-r.client.tagging }()
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	for range referrerTries {
		list, err := r.taggedReferrers(ctx, subject)
		if err != nil {
			return err
		}
		if slices.ContainsFunc(list, func(d ocispec.Descriptor) bool { return d.Digest == listed.Digest }) {
			return nil
		}
		if len(list) >= maxReferrers {
			return r.fault("referrers of "+subject.String(), errdefs.ErrResourceExhausted, fmt.Errorf("there are %d already; delete some", len(list)))
		}
		data, err := json.Marshal(ocispec.Index{
			Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: append(list, listed),
		})
		if err != nil {
			return err
		}
		if _, err := r.PushManifest(ctx, ocispec.MediaTypeImageIndex, data, referrersTag(subject)); err != nil {
			return err
		}
	}
	return r.fault("referrers of "+subject.String(), errdefs.ErrAborted, errors.New("somebody else writes their list again and again"))
}
