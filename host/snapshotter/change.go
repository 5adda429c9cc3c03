package snapshotter

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/pkg/snapshotters"
	"github.com/containerd/errdefs"
)

// Mounts returns the mount list of an active or view snapshot again. After a
// restart of the machine this is what has the node mount the image again.
func (s *Snapshotter) Mounts(ctx context.Context, key string) ([]mount.Mount, error) {
	l, err := s.layoutOf(ctx, key)
	if err != nil {
		return nil, fmt.Errorf("mounts of snapshot %q: %w", key, err)
	}
	if l.record.holder != "" {
		if err := s.holdAgain(ctx, key, &l); err != nil {
			return nil, fmt.Errorf("mounts of snapshot %q: %w", key, err)
		}
	}
	return s.mounts(l)
}

func (s *Snapshotter) layoutOf(ctx context.Context, key string) (l layout, err error) {
	err = s.view(ctx, func(ctx context.Context) error {
		sn, err := storage.GetSnapshot(ctx, key)
		if err != nil {
			return err
		}
		_, info, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		l.id, l.kind, l.unpack = sn.ID, sn.Kind, isUnpack(key)
		if l.record, err = readRecord(info.Labels); err != nil {
			return err
		}
		l.base, err = find(ctx, info.Parent)
		return err
	})
	if err == nil && l.record.mode == Block {
		_, err := os.Stat(s.path(l.id, upperFile))
		l.upper = err == nil
	}
	return l, err
}

func (s *Snapshotter) holdAgain(ctx context.Context, key string, l *layout) (err error) {
	if l.given, err = s.hold(ctx, l.record); err != nil {
		return err
	}
	s.links.Lock()
	defer s.links.Unlock()
	// Remove may have come between; it releases after the record is gone.
	if now, err := s.layoutOf(ctx, key); err != nil || now.id != l.id {
		ctx, cancel := undoing(ctx)
		defer cancel()
		return errors.Join(err, fmt.Errorf("removed meanwhile: %w", errdefs.ErrNotFound), s.cfg.Images.Release(ctx, l.record.holder))
	}
	if l.given.lower == "" {
		return nil
	}
	return s.link(l.id, l.given.lower)
}

// Commit makes an active snapshot a layer. One whose writes are in a VM, or in a
// directory of which the VM owns every name, is ErrNotImplemented: the directory for
// writes here is empty.
func (s *Snapshotter) Commit(ctx context.Context, name, key string, opts ...snapshots.Opt) error {
	info, err := infoOf(opts)
	if err == nil {
		err = checkKey("name", name)
	}
	if err != nil {
		return fmt.Errorf("commit snapshot: %w", err)
	}
	old, err := s.layoutOf(ctx, key)
	if err != nil {
		return fmt.Errorf("commit snapshot %q: %w", key, err)
	}
	if m := old.record.mode; m == Guest || m == Block || m == Nydus {
		return fmt.Errorf("commit snapshot %q: in mode %s what the container wrote is the VM's; use mode share or full: %w", key, m, errdefs.ErrNotImplemented)
	}
	usage, err := s.diskUsage(ctx, old.id) // it may take long, so outside of the transaction
	if err != nil {
		return err
	}
	made := record{mode: Full, reason: old.record.reason, chain: Chain{Reference: info.Labels[snapshotters.TargetRefLabel]}}
	opts = append(slices.Clone(opts), snapshots.WithLabels(made.addTo(info.Labels)))
	err = s.update(ctx, func(ctx context.Context) error {
		id, err := storage.CommitActive(ctx, key, name, usage, opts...)
		if err == nil && id != old.id {
			err = fmt.Errorf("replaced meanwhile: %w", errdefs.ErrNotFound)
		}
		s.cfg.step("committing")
		return err
	})
	if err != nil {
		return fmt.Errorf("commit snapshot %q as %q: %w", key, name, err)
	}
	s.cfg.step("committed")
	s.letGo(ctx, old.record.holder)
	err = os.Remove(s.path(old.id, lowerLink))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err = errors.Join(err, os.RemoveAll(s.path(old.id, usersDir))); err != nil {
		s.log.Warn("a layer keeps something that it does not need", "name", name, "error", err)
	}
	return nil
}

// Remove removes a snapshot that has no children. What it held goes after its
// record; when that fails, at the next Cleanup.
func (s *Snapshotter) Remove(ctx context.Context, key string) error {
	var id string
	var r record
	var kind snapshots.Kind
	err := s.update(ctx, func(ctx context.Context) error {
		_, info, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		if r, err = readRecord(info.Labels); err != nil {
			return err
		}
		id, kind, err = storage.Remove(ctx, key)
		s.cfg.step("removing")
		return err
	})
	if err != nil {
		return fmt.Errorf("remove snapshot %q: %w", key, err)
	}
	s.cfg.step("removed")
	if err := s.discard(id); err != nil {
		s.log.Warn("the directory of a removed snapshot stays for now", "key", key, "error", err)
	}
	s.cfg.step("directory removed")
	s.letGo(ctx, r.holder)
	s.cfg.step("let go")
	if kind == snapshots.KindCommitted && r.remote() {
		s.disown(ctx, use{s.cfg.Name, r.chain.Manifest})
	}
	return nil
}

// discard removes the directory of a snapshot without a record; there may be
// none.
func (s *Snapshotter) discard(id string) error {
	trash, err := s.putAside(id)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	s.cfg.step("put aside")
	return errors.Join(err, os.RemoveAll(s.path(trash)))
}

// putAside gives a directory a name of which nobody has a record.
func (s *Snapshotter) putAside(name string) (trash string, err error) {
	s.links.Lock()
	defer s.links.Unlock()
	trash = trashPrefix + strings.ToLower(rand.Text())
	return trash, os.Rename(s.path(name), s.path(trash))
}

// letGo releases a holder, at the latest at the next Cleanup.
func (s *Snapshotter) letGo(ctx context.Context, holder string) {
	if holder == "" {
		return
	}
	ctx, cancel := undoing(ctx)
	defer cancel()
	if err := s.cfg.Images.Release(ctx, holder); err != nil {
		s.log.Warn("a mount that is not needed any more stays for now", "holder", holder, "error", err)
	}
}
