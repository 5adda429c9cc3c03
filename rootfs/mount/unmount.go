package mount

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Unmount undoes a mount. The target is detached even if it is in use: it
// disappears at once, and processes that have files of it open read on until
// they close them. ErrNotFound if there is no such mount.
func (m *Mounter) Unmount(ctx context.Context, id string) error {
	unlock, err := m.locks.lock(ctx, "mount "+id)
	if err != nil {
		return fmt.Errorf("wait for mount %s: %w", id, err)
	}
	defer unlock()
	rec, ok := m.get(id)
	if !ok {
		return fmt.Errorf("unmount %s: %w", id, errdefs.ErrNotFound)
	}
	if err := m.unmount(ctx, rec); err != nil {
		return err
	}
	m.log.Info("image unmounted", "id", rec.ID, "reference", rec.Reference, "target", rec.Target)
	return nil
}

// unmount releases all that a record holds. Should that fail midway the record
// stays, and unmounting can be tried again.
// Precondition: the ID's lock is held.
func (m *Mounter) unmount(ctx context.Context, rec Record) error {
	mounts, err := readMounts()
	if err != nil {
		return err
	}
	ours := mounts.holds(&rec) || !mounts.has(rec.Target) || rec.State == Mounting
	rec.State = Unmounting
	if err := m.put(rec); err != nil {
		return err
	}
	if err := m.removeTop(&rec, ours); err != nil {
		return fmt.Errorf("unmount %s: %w", rec.ID, err)
	}
	// From here on the record is gone: a second try must not release twice.
	if err := m.forget(rec.ID); err != nil {
		return err
	}
	m.mu.Lock()
	lw := m.lowers[rec.Manifest]
	m.mu.Unlock()
	if lw == nil {
		return nil
	}
	return m.release(context.WithoutCancel(ctx), lw)
}

// UnmountAll undoes every mount and waits, as long as ctx lets it, until the
// kernel has closed the images.
func (m *Mounter) UnmountAll(ctx context.Context) error {
	var errs error
	for _, rec := range m.List() {
		if err := m.Unmount(ctx, rec.ID); err != nil && !errdefs.IsNotFound(err) {
			errs = errors.Join(errs, err)
		}
	}
	return errors.Join(errs, m.Drain(ctx))
}

// Drain waits, as long as ctx lets it, until the kernel has closed those of the
// images that are unmounted by now; without images, all of them.
func (m *Mounter) Drain(ctx context.Context, images ...digest.Digest) error {
	m.mu.Lock()
	waiting := slices.Collect(maps.Values(m.draining))
	m.mu.Unlock()
	for _, lw := range waiting {
		if len(images) > 0 && !slices.Contains(images, lw.rec.Manifest) {
			continue
		}
		select {
		case <-lw.released:
		case <-m.ended:
			return nil
		case <-ctx.Done():
			return fmt.Errorf("image %s is still in use: %w", lw.rec.Reference, ctx.Err())
		}
	}
	return nil
}

// Sweep undoes every mount whose target somebody else has unmounted, and
// returns how many those were.
func (m *Mounter) Sweep(ctx context.Context) (int, error) {
	mounts, err := readMounts()
	if err != nil {
		return 0, err
	}
	var errs error
	swept := 0
	for _, rec := range m.List() {
		if rec.State != Mounted || mounts.holds(&rec) {
			continue
		}
		done, err := m.sweepOne(ctx, rec.ID)
		errs = errors.Join(errs, err)
		if done {
			swept++
		}
	}
	return swept, errs
}

// sweepOne looks once more under the ID's lock: the mount may have been undone
// and made again since.
func (m *Mounter) sweepOne(ctx context.Context, id string) (bool, error) {
	unlock, err := m.locks.lock(ctx, "mount "+id)
	if err != nil {
		return false, fmt.Errorf("wait for mount %s: %w", id, err)
	}
	defer unlock()
	rec, ok := m.get(id)
	mounts, err := readMounts()
	if err != nil || !ok || rec.State != Mounted || mounts.holds(&rec) {
		return false, err
	}
	if err := m.unmount(ctx, rec); err != nil {
		return false, err
	}
	m.log.Info("image released; its target was unmounted by somebody else",
		"id", rec.ID, "reference", rec.Reference, "target", rec.Target, "mounted_for", time.Since(rec.Created))
	return true, nil
}
