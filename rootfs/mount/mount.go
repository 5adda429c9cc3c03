package mount

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
)

// Mount mounts an image and returns when Target is a mount point. The same
// call again returns the mount that is there. An ID or a Target that is taken
// by something else is ErrAlreadyExists, naming both. A failed Mount leaves
// nothing behind; when ctx ends it fails, although a thread that waits for a
// local file's filesystem stays until that answers.
func (m *Mounter) Mount(ctx context.Context, spec Spec) (Record, error) {
	taken := false
	defer func() {
		if !taken && spec.Image != nil {
			m.closeFile(spec.Image)
		}
	}()
	if err := spec.validate(); err != nil {
		return Record{}, err
	}
	unlock, err := m.locks.lock(ctx, "mount "+spec.ID)
	if err != nil {
		return Record{}, fmt.Errorf("wait for mount %s: %w", spec.ID, err)
	}
	defer unlock()
	rec := Record{
		Version: recordVersion, ID: spec.ID, Reference: spec.Reference, Manifest: spec.Manifest,
		Target: filepath.Clean(spec.Target), Upper: spec.Upper, ReadOnly: spec.ReadOnly,
		State: Mounting, Created: time.Now().UTC(),
	}
	if err := resolveTarget(&rec); err != nil {
		return Record{}, err
	}
	if have, ok := m.get(spec.ID); ok {
		again, err := m.already(ctx, have, rec)
		if again || err != nil {
			return have, err
		}
		// Undoing what was left may have removed the target directory.
		if err := resolveTarget(&rec); err != nil {
			return Record{}, err
		}
	}
	return m.mount(ctx, spec, rec, &taken)
}

// already decides about a Mount whose ID is in use: again is true if it is the
// same mount and stands.
func (m *Mounter) already(ctx context.Context, have, want Record) (again bool, err error) {
	if have.Manifest != want.Manifest || have.Target != want.Target || have.Upper != want.Upper || have.ReadOnly != want.ReadOnly {
		return false, fmt.Errorf("mount %s of %s at %s: the ID stands for %s at %s; unmount that or choose another ID: %w",
			want.ID, want.Reference, want.Target, have.Reference, have.Target, errdefs.ErrAlreadyExists)
	}
	mounts, err := readMounts()
	if err != nil {
		return false, err
	}
	if have.State == Mounted && mounts.holds(&have) {
		return true, nil
	}
	return false, m.unmount(ctx, have)
}

// mount does the work. taken tells that the image has another owner.
// Precondition: the ID's lock is held and no record has the ID.
func (m *Mounter) mount(ctx context.Context, spec Spec, rec Record, taken *bool) (_ Record, err error) {
	mounts, err := readMounts()
	if err != nil {
		return Record{}, err
	}
	var undo undoStack
	defer func() {
		if err != nil {
			err = undo.run(ctx, err)
		}
	}()
	if err := m.putNew(rec); err != nil {
		return Record{}, err
	}
	undo.push(func(context.Context) error { return m.forget(rec.ID) })
	if mounts.has(rec.Target) {
		return Record{}, fmt.Errorf("mount %s: something is mounted at %s already; unmount it or choose another target: %w",
			rec.ID, rec.Target, errdefs.ErrFailedPrecondition)
	}
	*taken = true
	lw, err := m.acquire(ctx, spec)
	if err != nil {
		return Record{}, err
	}
	undo.push(func(ctx context.Context) error { return m.release(ctx, lw) })
	m.describe(&rec, lw)
	undo.push(func(context.Context) error { return m.removeTop(&rec, true) })
	if err := m.mountTop(ctx, lw, &rec); err != nil {
		return Record{}, fmt.Errorf("mount %s of %s at %s: %w", rec.ID, rec.Reference, rec.Target, err)
	}
	rec.State = Mounted
	if err := m.put(rec); err != nil {
		return Record{}, err
	}
	m.log.Info("image mounted", "id", rec.ID, "reference", rec.Reference, "target", rec.Target, "path", rec.Path, "source", rec.Source)
	return rec, nil
}

// describe copies to a mount's record what its lower is.
func (m *Mounter) describe(rec *Record, lw *lower) {
	m.mu.Lock()
	defer m.mu.Unlock()
	rec.Path, rec.Source, rec.Size = lw.rec.Path, lw.rec.Source, lw.rec.Size
	if lw.rec.direct() {
		rec.Local = lw.rec.Local
	}
}

// resolveTarget makes the target's name the one that the kernel will show, and
// notes whether the directory has to be made.
func resolveTarget(rec *Record) error {
	parent, err := filepath.EvalSymlinks(filepath.Dir(rec.Target))
	if errors.Is(err, os.ErrNotExist) {
		if err := os.MkdirAll(filepath.Dir(rec.Target), 0o755); err != nil {
			return fmt.Errorf("mount %s: make target: %w", rec.ID, err)
		}
		parent, err = filepath.EvalSymlinks(filepath.Dir(rec.Target))
	}
	if err != nil {
		return fmt.Errorf("mount %s: target: %w", rec.ID, err)
	}
	rec.Target = filepath.Join(parent, filepath.Base(rec.Target))
	st, err := os.Lstat(rec.Target)
	switch {
	case errors.Is(err, os.ErrNotExist):
		rec.MadeTarget = true
		return nil
	case err != nil:
		return fmt.Errorf("mount %s: target: %w", rec.ID, err)
	case !st.IsDir():
		return fmt.Errorf("mount %s: target %s is not a directory: %w", rec.ID, rec.Target, errdefs.ErrInvalidArgument)
	}
	return nil
}
