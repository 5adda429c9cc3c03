package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
)

// prepareRemote makes the layer's committed record when the node serves the
// image lazily. When it does not and the mode may fall back to Full, the reason
// is kept in the request. A failure that may pass fails the pull: it is tried
// again, while an image that was unpacked stays so until it is pulled anew.
func (s *Snapshotter) prepareRemote(ctx context.Context, r *request) (done bool, err error) {
	if done, err := s.exists(ctx, r); done || err != nil {
		return done, err
	}
	err = s.serve(ctx, r)
	if err == nil {
		return true, nil
	}
	lazy := errLazy{}
	if ctx.Err() != nil || !errors.As(err, &lazy) || !slices.Contains(s.cfg.Fallback, Full) {
		return false, err
	}
	r.reason = reasonOf(err)
	s.log.Warn("a layer is not served lazily; containerd unpacks it", "reference", r.labels[snapshotters.TargetRefLabel], "layer", r.target, "error", err)
	return false, nil
}

// errLazy is why the node cannot serve a layer lazily.
type errLazy struct{ error }

func (e errLazy) Unwrap() error { return e.error }

// exists says whether the layer has a record on the same parent.
func (s *Snapshotter) exists(ctx context.Context, r *request) (found bool, err error) {
	if r.target == "" {
		return false, nil
	}
	err = s.view(ctx, func(ctx context.Context) error {
		_, found = remoteName(ctx, r)
		return nil
	})
	return found, err
}

// serve asks the node for the image and makes the record.
func (s *Snapshotter) serve(ctx context.Context, r *request) (err error) {
	ref, manifest := r.labels[snapshotters.TargetRefLabel], digest.Digest(r.labels[snapshotters.TargetManifestDigestLabel])
	if r.target == "" || ref == "" || manifest.Validate() != nil {
		return errLazy{fmt.Errorf("containerd does not name the layer and the image (labels %s, %s and %s); set disable_snapshot_annotations = false: %w",
			snapshots.LabelSnapshotRef, snapshotters.TargetRefLabel, snapshotters.TargetManifestDigestLabel, errdefs.ErrFailedPrecondition)}
	}
	if err := checkKey("label "+snapshotters.TargetRefLabel, ref); err != nil {
		return err
	}
	u := use{s.cfg.Name, manifest}
	if err := s.owners.acquire(ctx, u); err != nil {
		return err
	}
	kept := false
	defer func() {
		if !kept {
			s.disown(ctx, u)
		}
	}()
	s.cfg.step("owned")
	diffIDs, err := s.refusals.ask(ctx, use{ref, manifest}, func() ([]digest.Digest, error) { return s.prepareImage(ctx, ref, manifest) })
	if err != nil {
		return err
	}
	chain := Chain{Reference: ref, Manifest: manifest, Of: len(diffIDs)}
	if chain.Layers = slices.Index(chainIDs(diffIDs), r.target) + 1; chain.Layers == 0 {
		return errLazy{fmt.Errorf("image %s has no layer of chain ID %s: %w", manifest, r.target, errdefs.ErrFailedPrecondition)}
	}
	s.cfg.step("prepared")
	kept, err = s.insertRemote(ctx, r, chain)
	return err
}

// prepareImage has the node prepare an image, and looks at what its chain IDs
// are worth if that is asked for.
func (s *Snapshotter) prepareImage(ctx context.Context, ref string, manifest digest.Digest) ([]digest.Digest, error) {
	pulling := ctx
	if s.cfg.Pulling != nil {
		pulling = s.cfg.Pulling(ctx, ref)
	}
	diffIDs, err := s.cfg.Images.Prepare(pulling, ref, manifest)
	if err != nil || !s.cfg.Verified {
		return diffIDs, err
	}
	verified, err := s.cfg.Images.Verified(ctx, manifest)
	if err == nil && !verified {
		err = fmt.Errorf("layers of image %s have a table of contents by their publisher, which cannot be held against the diffIDs before all is read (setting chain_ids): %w", manifest, errdefs.ErrFailedPrecondition)
	}
	return diffIDs, err
}

// chainIDs names each layer with all below it.
func chainIDs(diffIDs []digest.Digest) []string {
	var out []string
	for _, id := range identity.ChainIDs(slices.Clone(diffIDs)) {
		out = append(out, id.String())
	}
	return out
}

// insertRemote makes the record, which uses the image from then on, unless
// another call has made it meanwhile.
func (s *Snapshotter) insertRemote(ctx context.Context, r *request, chain Chain) (made bool, err error) {
	err = s.update(ctx, func(ctx context.Context) error {
		name, found := remoteName(ctx, r)
		if made = !found; found {
			return nil
		}
		if _, err := storage.CreateSnapshot(ctx, snapshots.KindActive, r.key, r.parent); err != nil {
			return err
		}
		labels := record{chain: chain}.addTo(r.labels)
		labels[snapshots.LabelSnapshotRef] = r.target // by which containerd finds it
		if _, err := storage.CommitActive(ctx, r.key, name, snapshots.Usage{}, snapshots.WithLabels(labels)); err != nil {
			return err
		}
		s.cfg.step("remote inserted")
		return nil
	})
	if err != nil {
		return false, err
	}
	s.cfg.step("remote created")
	return made, nil
}

// remoteName is under which name the layer's record is, or is to be. It is the
// chain ID; when a record of that name lies on another parent (another
// namespace unpacked that one itself), the chain ID with the parent's digest.
// containerd finds it by its label and parent (createSnapshot in its
// core/metadata/snapshot.go). Precondition: ctx has a transaction.
func remoteName(ctx context.Context, r *request) (name string, found bool) {
	for _, name := range []string{r.target, r.target + "@" + digest.FromString(r.parent).Encoded()} {
		_, info, _, err := storage.GetInfo(ctx, name)
		if err != nil {
			return name, false
		}
		if info.Kind == snapshots.KindCommitted && info.Parent == r.parent && info.Labels[snapshots.LabelSnapshotRef] == r.target {
			return name, true
		}
	}
	// A client took both names; the insertion fails, as it has to.
	return r.target, false
}

// disown counts one use of the image less, at the latest at the next Cleanup.
func (s *Snapshotter) disown(ctx context.Context, u use) {
	ctx, cancel := undoing(ctx)
	defer cancel()
	if err := s.owners.release(ctx, u); err != nil {
		s.log.Warn("an image that is not used any more stays for now", "manifest", u.manifest, "error", err)
	}
}
