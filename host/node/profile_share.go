package node

import (
	"bytes"
	"context"
	"fmt"
	"slices"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/host/profile"
	"github.com/tatami-containers/tatami/rootfs/artifact"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/pathlist"
	"github.com/tatami-containers/tatami/rootfs/registry"
)

// Bounds of what is asked of a registry about profiles.
const (
	maxPublished   = 4 // of one image that are read
	publishedWait  = 20 * time.Second
	publishWait    = time.Minute
	publishedAfter = 3 // starts
)

// PushProfile publishes the profile of all commands beside the image, in the
// repository of the lease. Of commands it says nothing.
func (l *Lease) PushProfile(ctx context.Context) (ocispec.Descriptor, error) {
	p := l.n.loadProfile(l.Manifest(), "")
	if p == nil {
		return ocispec.Descriptor{}, l.noProfile("")
	}
	return l.n.pushProfile(ctx, l.repo, l.record, p)
}

func (n *Node) pushProfile(ctx context.Context, repo *registry.Repository, r *record, p *profile.Profile) (ocispec.Descriptor, error) {
	t, err := n.tree(r)
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	ranges, err := profile.Encode(&profile.Profile{Source: profile.Registry, Runs: p.Runs, Parts: p.Parts})
	if err != nil {
		return ocispec.Descriptor{}, err
	}
	var descs []ocispec.Descriptor
	for _, f := range []struct {
		kind string
		data []byte
	}{
		{profile.RangesType, ranges},
		{profile.PathsType, pathlist.Write(t.Paths(p.Replay()))},
		{ocispec.MediaTypeEmptyJSON, ocispec.DescriptorEmptyJSON.Data},
	} {
		desc := artifact.Describe(f.kind, f.data)
		if err := pushBlob(ctx, repo, desc, f.data); err != nil {
			return desc, fmt.Errorf("publish the profile of image %s: %w", r.Manifest.Digest, err)
		}
		descs = append(descs, desc)
	}
	desc, data, err := profile.Artifact(r.Manifest, descs[0], descs[1])
	if err != nil {
		return desc, err
	}
	if _, err := repo.PushManifest(ctx, desc.MediaType, data, ""); err != nil {
		return desc, fmt.Errorf("publish the profile of image %s: %w", r.Manifest.Digest, err)
	}
	n.log.Info("start-up profile published", "manifest", r.Manifest.Digest, "repository", repo.Name(), "profile", desc.Digest)
	return desc, nil
}

func pushBlob(ctx context.Context, repo *registry.Repository, desc ocispec.Descriptor, data []byte) error {
	has, err := repo.Has(ctx, desc)
	if err != nil || has {
		return err
	}
	return repo.PushBlob(ctx, desc, bytes.NewReader(data))
}

// publishAfter publishes the profile of an image in the background when it is of enough
// starts, nobody has published one, and the settings allow it. It is tried again after
// as many starts.
func (n *Node) publishAfter(l *Lease, p *profile.Profile) {
	if !n.cfg.Profiles.Push || p.Runs%publishedAfter != 0 {
		return
	}
	repo, r := l.repo, l.record
	n.background.Go(func() {
		ctx, cancel := context.WithTimeout(n.ctx, publishWait)
		defer cancel()
		refs, err := repo.Referrers(ctx, r.Manifest.Digest, profile.ArtifactType)
		if err == nil && len(refs) == 0 {
			_, err = n.pushProfile(ctx, repo, r, p)
		}
		if err != nil && n.ctx.Err() == nil {
			n.log.Warn("a start-up profile cannot be published; give the node credentials that may push, or set profile.push = false",
				"manifest", r.Manifest.Digest, "error", err)
		}
	})
}

// findProfile looks for profiles that were published beside an image, and keeps that
// of most starts; nil when there is none that can be used. Anybody who may push to the
// repository can have made it: at worst, what nobody reads is fetched.
func (n *Node) findProfile(ctx context.Context, repo *registry.Repository, r *record, segments []index.Segment) *profile.Profile {
	ctx, cancel := context.WithTimeout(ctx, publishedWait)
	defer cancel()
	refs, err := repo.Referrers(ctx, r.Manifest.Digest, profile.ArtifactType)
	if err != nil {
		n.log.Debug("the registry does not tell of start-up profiles", "manifest", r.Manifest.Digest, "error", err)
		return nil
	}
	var best *profile.Profile
	for _, desc := range refs[:min(len(refs), maxPublished)] {
		p, err := n.readPublished(ctx, repo, r, segments, desc)
		if err != nil {
			n.log.Warn("a published start-up profile cannot be used", "manifest", r.Manifest.Digest, "profile", desc.Digest, "error", err)
		} else if len(p.Parts) > 0 && (best == nil || p.Runs > best.Runs) {
			best = p
		}
	}
	if best == nil {
		return nil
	}
	kept, err := n.changeProfile(r.Manifest.Digest, "", func(p *profile.Profile) {
		if p.Runs == 0 { // else a start was recorded meanwhile
			*p = *best
		}
	})
	if err != nil {
		n.log.Warn("a published start-up profile is not kept", "manifest", r.Manifest.Digest, "error", err)
		return best
	}
	return kept
}

// readPublished reads a published profile: the ranges, as far as they are chunks of
// the image, or the paths if that is less than half of them.
func (n *Node) readPublished(ctx context.Context, repo *registry.Repository, r *record, segments []index.Segment, desc ocispec.Descriptor) (*profile.Profile, error) {
	data, err := repo.Manifest(ctx, desc)
	if err != nil {
		return nil, err
	}
	ranges, paths, err := profile.Files(data, r.Manifest.Digest)
	if err != nil {
		return nil, err
	}
	p := &profile.Profile{}
	if ranges.Digest != "" {
		if data, err = repo.Blob(ctx, ranges); err != nil {
			return nil, err
		}
		if p, err = profile.Decode(data); err != nil {
			return nil, err
		}
	}
	p.Source, p.Entrypoint, p.Command = profile.Registry, "", ""
	all := len(p.Parts) // within what MaxEncoded has room for
	p.Parts = slices.DeleteFunc(p.Parts, func(k profile.Part) bool { return !isChunk(segments, k.Range) })
	p.Bound(profile.MaxBytes(r.ImageSize))
	if paths.Digest == "" || len(p.Parts) > 0 && 2*len(p.Parts) >= all {
		return p, nil
	}
	if data, err = repo.Blob(ctx, paths); err != nil {
		return nil, err
	}
	return n.fromPaths(r, segments, data)
}

func (n *Node) fromPaths(r *record, segments []index.Segment, list []byte) (*profile.Profile, error) {
	paths, err := pathlist.Read(bytes.NewReader(list))
	if err != nil {
		return nil, err
	}
	found, _, err := n.find(r, segments, paths)
	if err != nil {
		return nil, err
	}
	p := &profile.Profile{Source: profile.Registry}
	p.Add(found, profile.MaxBytes(r.ImageSize), false)
	return p, nil
}

// isChunk says whether r is one chunk of one of the segments.
func isChunk(segments []index.Segment, r profile.Range) bool {
	k := slices.IndexFunc(segments, func(s index.Segment) bool { return s.ID == r.Segment })
	if k < 0 {
		return false
	}
	c := spanned(segments[k].Table, r.Off, r.End())
	return len(c) == 1 && c[0].Off == r.Off && c[0].Len == r.Len
}
