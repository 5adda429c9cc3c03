package snapshotter

import (
	"context"
	"fmt"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// request is a call of Prepare or View.
type request struct {
	kind        snapshots.Kind
	key, parent string
	labels      map[string]string
	mode        Mode   // asked for
	target      string // chain ID of the layer that is to be there; "" of a container
	unpack      bool   // containerd is to unpack the layer in it
	reason      string // why the layer is not served lazily
}

// Prepare makes an active snapshot: for a container, or for containerd to unpack
// a layer in. When the node serves the layer lazily it makes a committed one
// instead and returns ErrAlreadyExists, so that containerd neither downloads nor
// unpacks (the remote-snapshot protocol: LabelSnapshotRef in containerd's
// core/snapshots/snapshotter.go).
func (s *Snapshotter) Prepare(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	r, err := s.request(snapshots.KindActive, key, parent, opts)
	if err != nil {
		return nil, fmt.Errorf("prepare snapshot: %w", err)
	}
	if r.mode != Full && (r.target != "" || r.unpack) {
		switch done, err := s.prepareRemote(ctx, r); {
		case err != nil:
			return nil, fmt.Errorf("prepare layer %s: %w", r.target, err)
		case done:
			return nil, fmt.Errorf("target snapshot %q: %w", r.target, errdefs.ErrAlreadyExists)
		}
	}
	return s.create(ctx, r)
}

// View makes a snapshot that is only read.
func (s *Snapshotter) View(ctx context.Context, key, parent string, opts ...snapshots.Opt) ([]mount.Mount, error) {
	r, err := s.request(snapshots.KindView, key, parent, opts)
	if err != nil {
		return nil, fmt.Errorf("view snapshot: %w", err)
	}
	return s.create(ctx, r)
}

func (s *Snapshotter) request(kind snapshots.Kind, key, parent string, opts []snapshots.Opt) (*request, error) {
	info, err := infoOf(opts)
	if err != nil {
		return nil, err
	}
	if err := checkKey("key", key); err != nil {
		return nil, err
	}
	if parent != "" {
		if err := checkKey("parent", parent); err != nil {
			return nil, err
		}
	}
	r := &request{
		kind: kind, key: key, parent: parent, labels: info.Labels,
		target: info.Labels[snapshots.LabelSnapshotRef], unpack: kind == snapshots.KindActive && isUnpack(key),
	}
	if r.target != "" {
		if err := checkKey("label "+snapshots.LabelSnapshotRef, r.target); err != nil {
			return nil, err
		}
	}
	r.mode, err = s.askedMode(info.Labels)
	return r, err
}

// isUnpack knows the keys of containerd's unpacker, "extract-<unique> <chain ID>"
// (UnpackKeyFormat). Its label is no sign: CRI copies that from the annotations
// of a pod too, and what is unpacked here is not in the mode that was set.
func isUnpack(key string) bool {
	prefix, chain, _ := strings.Cut(ContainerOf(key), " ")
	return strings.HasPrefix(prefix, snapshots.UnpackKeyPrefix+"-") && digest.Digest(chain).Validate() == nil
}

// ContainerOf returns the name in a key "<namespace>/<number>/<name>", which
// is how containerd's metadata store calls a proxy plugin, or else the key.
func ContainerOf(key string) string {
	if parts := strings.SplitN(key, "/", 3); len(parts) == 3 {
		return parts[2]
	}
	return key
}

func (s *Snapshotter) askedMode(labels map[string]string) (Mode, error) {
	asked, ok := labels[LabelMode]
	if !ok {
		return s.cfg.Mode, nil
	}
	if !slices.Contains(s.cfg.Allow, Mode(asked)) {
		return "", fmt.Errorf("label %s asks for mode %.32q, which the setting \"allow\" of snapshotter %q does not have: %w",
			LabelMode, asked, s.cfg.Name, errdefs.ErrInvalidArgument)
	}
	return Mode(asked), nil
}

// base is what a snapshot lies on.
type base struct {
	full   []string // ids of the unpacked layers, the highest first
	chain  Chain    // below them; without a manifest there is none
	reason string   // why the highest unpacked layer is not served lazily
}

// find reads what lies from parent down. Precondition: ctx has a transaction.
func find(ctx context.Context, parent string) (b base, err error) {
	for parent != "" {
		id, info, _, err := storage.GetInfo(ctx, parent)
		if err != nil {
			return base{}, fmt.Errorf("parent %q: %w", parent, err)
		}
		r, err := readRecord(info.Labels)
		if err != nil {
			return base{}, fmt.Errorf("parent %q: %w", parent, err)
		}
		if r.remote() {
			b.chain = r.chain
			break
		}
		if b.reason == "" {
			b.reason = r.reason
		}
		b.full = append(b.full, id)
		parent = info.Parent
	}
	return b, nil
}

// create makes an active or view snapshot: all it needs, then its record.
func (s *Snapshotter) create(ctx context.Context, r *request) (_ []mount.Mount, err error) {
	var b base
	err = s.view(ctx, func(ctx context.Context) (err error) {
		if _, _, _, err := storage.GetInfo(ctx, r.key); err == nil {
			return fmt.Errorf("snapshot %q: %w", r.key, errdefs.ErrAlreadyExists)
		}
		b, err = find(ctx, r.parent)
		return err
	})
	if err != nil {
		return nil, err
	}
	d := s.newDraft(r, b)
	defer func() { d.close(ctx, err) }()
	if err := d.furnish(ctx); err != nil {
		return nil, fmt.Errorf("prepare snapshot %q: %w", r.key, err)
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	id, err := d.insert(ctx)
	if err != nil {
		return nil, err
	}
	s.cfg.step("created")
	return s.mounts(d.layout(id))
}

// plan says in which modes to try a snapshot, in order, and why they are not
// those asked for.
func (s *Snapshotter) plan(r *request, b base) (tries []Mode, reason string) {
	switch {
	case r.unpack: // containerd unpacks into an ordinary directory
		return []Mode{Full}, r.reason
	case len(b.full) > 0 && r.mode != Full && b.reason == "":
		return []Mode{Full}, "its layers were unpacked on the host"
	case len(b.full) > 0 && r.mode != Full:
		return []Mode{Full}, b.reason
	case !b.remote():
		return []Mode{Full}, ""
	}
	for _, m := range append([]Mode{r.mode}, s.cfg.Fallback...) {
		if m == Full { // nothing was unpacked
			m = Share
		}
		if !slices.Contains(tries, m) {
			tries = append(tries, m)
		}
	}
	return tries, ""
}

func (b base) remote() bool { return len(b.full) == 0 && b.chain.Manifest != "" }
