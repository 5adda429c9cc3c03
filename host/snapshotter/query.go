package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	contfs "github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
)

// Stat returns what containerd knows of a snapshot.
func (s *Snapshotter) Stat(ctx context.Context, key string) (info snapshots.Info, err error) {
	err = s.view(ctx, func(ctx context.Context) error {
		_, info, _, err = storage.GetInfo(ctx, key)
		return err
	})
	return visibleInfo(info), err
}

// Update changes labels, of which ours stay.
func (s *Snapshotter) Update(ctx context.Context, info snapshots.Info, fieldpaths ...string) (out snapshots.Info, err error) {
	if err := checkLabels(info.Labels); err != nil {
		return snapshots.Info{}, fmt.Errorf("update snapshot %q: %w", info.Name, err)
	}
	for _, path := range fieldpaths {
		if label, ok := strings.CutPrefix(path, "labels."); ok {
			if err := checkLabels(map[string]string{label: ""}); err != nil {
				return snapshots.Info{}, fmt.Errorf("update snapshot %q: %w", info.Name, err)
			}
		}
	}
	all := len(fieldpaths) == 0 || slices.Contains(fieldpaths, "labels")
	err = s.update(ctx, func(ctx context.Context) error {
		_, old, _, err := storage.GetInfo(ctx, info.Name)
		if err != nil {
			return err
		}
		if all {
			info.Labels = keepOwn(info.Labels, old.Labels)
		}
		if out, err = storage.UpdateInfo(ctx, info, fieldpaths...); err != nil {
			return err
		}
		return checkLabels(visible(out.Labels)) // with those that stay
	})
	return visibleInfo(out), err
}

// keepOwn returns labels with those of ours in old.
func keepOwn(labels, old map[string]string) map[string]string {
	own := maps.Clone(old)
	maps.DeleteFunc(own, func(k, _ string) bool { return !strings.HasPrefix(k, ownPrefix) })
	if own == nil {
		return labels
	}
	maps.Copy(own, labels)
	return own
}

// Usage returns what a snapshot takes on disk, without its parents: of a layer
// that is served lazily, what the node keeps of it by now.
func (s *Snapshotter) Usage(ctx context.Context, key string) (usage snapshots.Usage, err error) {
	var id string
	var info snapshots.Info
	var r record
	err = s.view(ctx, func(ctx context.Context) error {
		if id, info, usage, err = storage.GetInfo(ctx, key); err != nil {
			return err
		}
		r, err = readRecord(info.Labels)
		return err
	})
	switch {
	case err != nil:
		return snapshots.Usage{}, err
	case info.Kind == snapshots.KindActive:
		return s.diskUsage(ctx, id)
	case info.Kind == snapshots.KindCommitted && r.remote():
		size, err := s.cfg.Images.Usage(ctx, r.chain)
		if errdefs.IsNotFound(err) {
			err = nil
		}
		return snapshots.Usage{Size: size}, err
	}
	return usage, nil
}

// diskUsage measures what an active snapshot has written.
func (s *Snapshotter) diskUsage(ctx context.Context, id string) (snapshots.Usage, error) {
	usage, err := contfs.DiskUsage(ctx, s.path(id, upperDir))
	if err != nil {
		return snapshots.Usage{}, err
	}
	for _, name := range []string{upperFile, guestDir} {
		more, err := contfs.DiskUsage(ctx, s.path(id, name))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return snapshots.Usage{}, err
		}
		usage.Size, usage.Inodes = usage.Size+more.Size, usage.Inodes+more.Inodes
	}
	return snapshots.Usage(usage), nil
}

// Walk calls fn for each snapshot that one of the filters matches.
func (s *Snapshotter) Walk(ctx context.Context, fn snapshots.WalkFunc, filters ...string) error {
	return s.walk(ctx, func(ctx context.Context, info snapshots.Info, _ record) error { return fn(ctx, visibleInfo(info)) }, filters...)
}

// walk calls fn when no transaction is open: one that only reads keeps bbolt
// from growing the file, so it must not wait for a client, nor for fn's own.
func (s *Snapshotter) walk(ctx context.Context, fn func(context.Context, snapshots.Info, record) error, filters ...string) error {
	infos, err := s.infos(ctx, filters)
	if err != nil {
		return err
	}
	for _, info := range infos {
		r, err := readRecord(info.Labels)
		if err != nil {
			return fmt.Errorf("snapshot %q: %w", info.Name, err)
		}
		if err := fn(ctx, info, r); err != nil {
			return err
		}
	}
	return nil
}

func (s *Snapshotter) infos(ctx context.Context, filters []string) (infos []snapshots.Info, err error) {
	err = s.view(ctx, func(ctx context.Context) error {
		return storage.WalkInfo(ctx, func(ctx context.Context, info snapshots.Info) error {
			infos = append(infos, info)
			return ctx.Err()
		}, filters...)
	})
	if errdefs.IsNotFound(err) {
		return nil, nil // there has never been a snapshot
	}
	return infos, err
}

// Entry says how a snapshot is served.
type Entry struct {
	Key    string
	Kind   snapshots.Kind
	Chain  Chain  // without a manifest, nothing comes lazily from the node
	Mode   Mode   // "" of a layer that is served lazily
	Reason string // why it is not the mode asked for
}

// List returns all snapshots, sorted by key.
func (s *Snapshotter) List(ctx context.Context) ([]Entry, error) {
	var out []Entry
	err := s.walk(ctx, func(_ context.Context, info snapshots.Info, r record) error {
		out = append(out, Entry{Key: info.Name, Kind: info.Kind, Chain: r.chain, Mode: r.mode, Reason: r.reason})
		return nil
	})
	return out, err
}

// Lookup finds the container's snapshot, in all namespaces, and returns the
// layers that it lies on and how it gets them. ErrNotFound when there is none
// or it has unpacked layers; ErrFailedPrecondition when namespaces have
// different containers of that name.
func (s *Snapshotter) Lookup(ctx context.Context, container string) (Chain, Mode, error) {
	var found []Entry
	err := s.walk(ctx, func(_ context.Context, info snapshots.Info, r record) error {
		if info.Kind != snapshots.KindCommitted && r.remote() && r.mode != Full && (info.Name == container || ContainerOf(info.Name) == container) {
			found = append(found, Entry{Chain: r.chain, Mode: r.mode})
		}
		return nil
	})
	switch {
	case err != nil:
		return Chain{}, "", err
	case len(found) == 0:
		return Chain{}, "", fmt.Errorf("snapshot of container %q: %w", container, errdefs.ErrNotFound)
	case slices.ContainsFunc(found, func(e Entry) bool { return e != found[0] }):
		return Chain{}, "", fmt.Errorf("container %q is in more than one namespace: %w", container, errdefs.ErrFailedPrecondition)
	}
	return found[0].Chain, found[0].Mode, nil
}
