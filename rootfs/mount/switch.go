package mount

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/mount/loop"
	"github.com/tatami-containers/tatami/rootfs/mount/thread"
)

// SwitchToLocal makes the lower of an image read a complete local file instead
// of the session: from then on this process is out of the path, and may die
// for good without anybody noticing. The file has the image's bytes and must
// not change as long as the image is mounted. Readers only feel a short pause.
//
// Only a lower on a loop device can be switched; for one on the file itself
// the kernel has no such call (ErrFailedPrecondition): prefer LoopPath for
// images that will be complete.
func (m *Mounter) SwitchToLocal(ctx context.Context, manifest digest.Digest, path string) error {
	unlock, err := m.locks.lock(ctx, "image "+manifest.String())
	if err != nil {
		return fmt.Errorf("wait for image %s: %w", manifest, err)
	}
	defer unlock()
	m.mu.Lock()
	lw := m.lowers[manifest]
	m.mu.Unlock()
	if lw == nil {
		return fmt.Errorf("switch image %s to a local file: it is not mounted: %w", manifest, errdefs.ErrNotFound)
	}
	select {
	case <-lw.released:
		return nil // was switched before, or mounted from a local file
	default:
	}
	if lw.rec.Path != LoopPath {
		return fmt.Errorf("switch image %s to a local file: it is mounted without a loop device; set the preferred path to %q and mount it again: %w",
			lw.rec.Reference, LoopPath, errdefs.ErrFailedPrecondition)
	}
	if err := syncFile(path, lw.rec.Size); err != nil {
		return fmt.Errorf("switch image %s to a local file: %w", lw.rec.Reference, err)
	}
	if err := thread.Isolated(func() error { return switchLoop(lw.rec.Loop, path) }); err != nil {
		return fmt.Errorf("switch image %s to a local file: %w", lw.rec.Reference, err)
	}
	return m.switched(ctx, lw, path)
}

// Local says whether an image that is mounted is read from a local file.
func (m *Mounter) Local(manifest digest.Digest) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	lw := m.lowers[manifest]
	return lw != nil && lw.rec.Local != ""
}

// syncFile checks the file and puts it on disk. The switch would do so itself,
// with all readers waiting.
func syncFile(path string, size int64) error {
	f, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("open: %w", err)
	}
	defer func() { _ = f.Close() }()
	st, err := f.Stat()
	if err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	if !st.Mode().IsRegular() || st.Size() != size {
		return fmt.Errorf("%s is no regular file of %d bytes: %w", path, size, errdefs.ErrInvalidArgument)
	}
	if err := f.Sync(); err != nil {
		return fmt.Errorf("sync: %w", err)
	}
	return nil
}

func switchLoop(device, path string) error {
	fd, err := unix.Open(path, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open %s: %w", path, err)
	}
	defer func() { _ = unix.Close(fd) }()
	return loop.Switch(device, fd)
}

// switched notes the new file and waits for the kernel to close the old one.
func (m *Mounter) switched(ctx context.Context, lw *lower, path string) error {
	m.mu.Lock()
	lw.rec.Local = path
	err := m.table.saveImage(&lw.rec)
	m.mu.Unlock()
	select {
	case <-lw.released:
		m.log.Info("image is read from a local file", "reference", lw.rec.Reference, "file", path, "device", lw.rec.Loop)
	case <-m.ended: // then it is closed as well
	case <-ctx.Done():
		err = errors.Join(err, ctx.Err())
	}
	return err
}
