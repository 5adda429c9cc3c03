package mount

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/mount/imagefs"
	"github.com/tatami-containers/tatami/rootfs/mount/loop"
	"github.com/tatami-containers/tatami/rootfs/mount/thread"
)

// erofsMagic is EROFS_SUPER_MAGIC_V1 of include/uapi/linux/magic.h.
const erofsMagic = 0xE0F5E1E2

// lower is the EROFS mount of one image, shared by its mounts.
type lower struct {
	rec      imageRecord   // protected by Mounter.mu
	file     File          // immutable; nil once the kernel has closed the image
	refs     int           // protected by Mounter.mu
	released chan struct{} // closed when the kernel has closed the image
}

func newLower(rec imageRecord, f File) *lower {
	return &lower{rec: rec, file: f, released: make(chan struct{})}
}

// acquire returns the lower of an image with one more reference, and mounts it
// if it is the first. It takes f over.
func (m *Mounter) acquire(ctx context.Context, spec Spec) (*lower, error) {
	unlock, err := m.locks.lock(ctx, "image "+spec.Manifest.String())
	if err != nil {
		m.closeFile(spec.Image)
		return nil, fmt.Errorf("wait for image %s: %w", spec.Reference, err)
	}
	defer unlock()
	m.mu.Lock()
	lw := m.lowers[spec.Manifest]
	m.mu.Unlock()
	if lw == nil {
		return m.mountLower(ctx, spec)
	}
	m.closeFile(spec.Image)
	var st unix.Statfs_t
	dir := m.table.lower(spec.Manifest)
	if err := unix.Statfs(dir, &st); err != nil || st.Type != erofsMagic {
		return nil, fmt.Errorf("EROFS of image %s is not mounted at %s any more, somebody unmounted it; unmount the mounts of this image first: %w",
			spec.Reference, dir, errdefs.ErrFailedPrecondition)
	}
	m.mu.Lock()
	lw.refs++
	m.mu.Unlock()
	return lw, nil
}

// mountLower tries the paths in order. Precondition: the image's lock is held.
func (m *Mounter) mountLower(ctx context.Context, spec Spec) (*lower, error) {
	paths, err := m.paths(ctx)
	if err != nil {
		m.closeFile(spec.Image)
		return nil, err
	}
	img, err := spec.measure(ctx)
	if err != nil {
		return nil, err
	}
	for _, p := range paths {
		img.Path = p
		lw, perr := m.tryPath(ctx, img, spec.Image)
		if perr == nil {
			return lw, nil
		}
		err = errors.Join(err, fmt.Errorf("mount EROFS of image %s (%s): %w", spec.Reference, p, perr))
		if ctx.Err() != nil {
			break
		}
	}
	m.closeFile(spec.Image)
	return nil, err
}

// tryPath mounts the lower one way, with a node of its own: the kernel may
// close the file of a failed try after the next one has opened its own.
func (m *Mounter) tryPath(ctx context.Context, rec imageRecord, f File) (_ *lower, err error) {
	if rec.Node, err = m.newNode(); err != nil {
		return nil, err
	}
	if f != nil {
		rec.Name = fileName(rec.Manifest, rec.Node)
	}
	lw := newLower(rec, f)
	var undo undoStack
	defer func() {
		if err != nil {
			err = undo.run(ctx, err)
		}
	}()
	undo.push(func(context.Context) error { return m.table.removeImage(rec.Node) })
	if err := m.table.saveImage(&lw.rec); err != nil {
		return nil, err
	}
	if err := m.serve(lw, &undo); err != nil {
		return nil, err
	}
	dir := m.table.lower(rec.Manifest)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("make mount point: %w", err)
	}
	undo.push(func(context.Context) error { return removeLowerDir(dir) })
	if lw.rec.Loop, err = m.attach(ctx, lw.rec, dir); err != nil {
		return nil, err
	}
	m.server.Seal(rec.Node)
	return lw, m.adopt(lw)
}

// serve gives the session the file of a lower, if it has one.
func (m *Mounter) serve(lw *lower, undo *undoStack) error {
	if lw.rec.direct() {
		close(lw.released) // it never was with the session
		return nil
	}
	if err := m.server.Add(imagefs.Node{ID: lw.rec.Node, Name: lw.rec.Name, Reference: lw.rec.Reference, File: lw.file}); err != nil {
		return err
	}
	undo.push(func(context.Context) error { m.server.Remove(lw.rec.Node); return nil })
	return nil
}

// adopt makes a lower known as mounted, with one reference.
func (m *Mounter) adopt(lw *lower) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	rec := lw.rec
	rec.State = Mounted
	if err := m.table.saveImage(&rec); err != nil {
		return err
	}
	lw.rec, lw.refs = rec, 1
	m.lowers[rec.Manifest] = lw
	return nil
}

// attach makes the mount. If ctx ends meanwhile the image's reads fail, so
// that the system calls come back.
func (m *Mounter) attach(ctx context.Context, rec imageRecord, dir string) (device string, err error) {
	if rec.direct() {
		return m.withReadAhead(ctx, rec.Path, func() (string, error) { return mountLocal(ctx, rec, dir) })
	}
	stop := context.AfterFunc(ctx, func() { m.server.Abort(rec.Node) })
	device, err = m.withReadAhead(ctx, rec.Path, func() (device string, err error) {
		err = thread.Isolated(func() (err error) {
			var fd int
			if device, fd, err = newLowerMount(ctx, rec.Path, m.filePath(rec.Name), rec.Size); err != nil {
				return err
			}
			return place(fd, dir)
		})
		return device, err
	})
	if !stop() { // the image is aborted, or about to be
		err = errors.Join(err, context.Cause(ctx))
	}
	if err != nil {
		return "", errors.Join(err, detach(dir))
	}
	return device, nil
}

// newLowerMount makes EROFS on the file at path one way, mounted nowhere yet.
// Precondition: the thread is isolated.
func newLowerMount(ctx context.Context, p Path, path string, size int64) (device string, fd int, err error) {
	if p == FilePath {
		fd, err = newErofs(path, true)
		var refused *paramError
		if errors.As(err, &refused) && refused.key == directio {
			// Before Linux 6.15; the session's files bypass the cache anyway, and
			// so do those of tatami-virtiofsd.
			fd, err = newErofs(path, false)
		}
		return "", fd, err
	}
	d, err := attachLoop(ctx, path, size)
	if err != nil {
		return "", -1, err
	}
	defer func() { _ = d.Close() }() // the mount keeps the device
	if !d.Direct {
		return "", -1, fmt.Errorf("loop device %s cannot read the image with direct I/O: %w", d.Path, errdefs.ErrNotImplemented)
	}
	fd, err = newErofs(d.Path, false)
	return d.Path, fd, err
}

func attachLoop(ctx context.Context, path string, size int64) (*loop.Device, error) {
	backing, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open image file %s: %w", path, err)
	}
	defer func() { _ = unix.Close(backing) }()
	return loop.Attach(ctx, backing, size)
}

const directio = "directio"

func newErofs(source string, direct bool) (int, error) {
	params := []param{setting("source", source), flag("ro")}
	if direct {
		params = append(params, flag(directio))
	}
	return newMount("erofs", unix.MOUNT_ATTR_RDONLY, params...)
}

// release gives one reference back. The last one unmounts the lower.
func (m *Mounter) release(ctx context.Context, lw *lower) error {
	unlock, err := m.locks.lock(ctx, "image "+lw.rec.Manifest.String())
	if err != nil {
		return fmt.Errorf("wait for image %s: %w", lw.rec.Reference, err)
	}
	defer unlock()
	m.mu.Lock()
	lw.refs--
	last := lw.refs <= 0
	m.mu.Unlock()
	if !last {
		return nil
	}
	return m.unmountLower(lw)
}

// unmountLower detaches the lower and serves its image on until the kernel
// closes it. Precondition: the image's lock is held.
func (m *Mounter) unmountLower(lw *lower) error {
	err := removeLowerDir(m.table.lower(lw.rec.Manifest))
	m.mu.Lock()
	delete(m.lowers, lw.rec.Manifest)
	if !lw.rec.Released {
		lw.rec.State = Draining
		m.draining[lw.rec.Node] = lw
		err = errors.Join(err, m.table.saveImage(&lw.rec))
		m.mu.Unlock()
		return err
	}
	defer m.mu.Unlock()
	select {
	case <-lw.released:
	default: // the file is being closed
		m.draining[lw.rec.Node] = lw
	}
	return errors.Join(err, m.table.removeImage(lw.rec.Node))
}

// removeLowerDir unmounts and removes a lower's mount point.
func removeLowerDir(dir string) error {
	if err := detach(dir); err != nil {
		return err
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove mount point: %w", err)
	}
	return nil
}

// released is told by the server that the kernel has closed an image: nothing
// will read it again. The record goes before the kernel gets its answer, so
// that a worker that dies between is told once more.
func (m *Mounter) released(node uint64) {
	m.mu.Lock()
	lw, err := m.markReleased(node)
	m.mu.Unlock()
	m.logUndone("forget image", err)
	if lw == nil {
		return
	}
	m.server.Remove(node)
	m.closeFile(lw.file)
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.draining, node)
	close(lw.released) // after the file: whoever waits may remove the image next
}

// markReleased returns the image of a node if this is its first release.
// Precondition: mu is held.
func (m *Mounter) markReleased(node uint64) (*lower, error) {
	if lw := m.draining[node]; lw != nil && !lw.rec.Released {
		lw.rec.Released = true
		return lw, m.table.removeImage(node)
	}
	for _, lw := range m.lowers {
		if lw.rec.Node == node && !lw.rec.Released {
			lw.rec.Released = true
			return lw, m.table.saveImage(&lw.rec)
		}
	}
	return nil, nil
}
