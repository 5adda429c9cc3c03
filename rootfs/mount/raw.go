package mount

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/mount/imagefs"
)

// RawPath is of an image that appears as a file and is not mounted: the disk of
// a virtual machine.
const RawPath Path = "raw"

// Expose makes an image appear as a read-only file in the session's directory,
// for other programs to open, and returns its path. The same image again has
// the same file. f is taken over, also when Expose fails.
func (m *Mounter) Expose(ctx context.Context, manifest digest.Digest, reference string, f File) (string, error) {
	unlock, err := m.locks.lock(ctx, "raw "+manifest.String())
	if err != nil {
		m.closeFile(f)
		return "", fmt.Errorf("expose image %s: %w", reference, err)
	}
	defer unlock()
	m.mu.Lock()
	lw := m.raws[manifest]
	m.mu.Unlock()
	if lw != nil {
		m.closeFile(f)
		return m.filePath(lw.rec.Name), nil
	}
	path, err := m.expose(manifest, reference, f)
	if err != nil {
		m.closeFile(f)
		return "", fmt.Errorf("expose image %s: %w", reference, err)
	}
	return path, nil
}

// expose writes the record first. Precondition: the image's raw lock is held.
func (m *Mounter) expose(manifest digest.Digest, reference string, f File) (string, error) {
	node, err := m.newNode()
	if err != nil {
		return "", err
	}
	lw := newLower(imageRecord{
		Version: recordVersion, Node: node, Name: fileName(manifest, node),
		Manifest: manifest, Reference: reference, Size: f.Size(), Path: RawPath, State: Mounted,
	}, f)
	if err := m.table.saveImage(&lw.rec); err != nil {
		return "", err
	}
	if err := m.addRaw(lw); err != nil {
		return "", errors.Join(err, m.table.removeImage(node))
	}
	return m.filePath(lw.rec.Name), nil
}

func (m *Mounter) addRaw(lw *lower) error {
	if err := m.server.Add(imagefs.Node{ID: lw.rec.Node, Name: lw.rec.Name, Reference: lw.rec.Reference, File: lw.file, Cached: true}); err != nil {
		return err
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	m.raws[lw.rec.Manifest] = lw
	return nil
}

// Conceal makes the file of Expose disappear: reads of it fail from now on, also
// through descriptors that are open. ErrNotFound when there is none.
func (m *Mounter) Conceal(ctx context.Context, manifest digest.Digest) error {
	unlock, err := m.locks.lock(ctx, "raw "+manifest.String())
	if err != nil {
		return fmt.Errorf("conceal image %s: %w", manifest, err)
	}
	defer unlock()
	m.mu.Lock()
	lw := m.raws[manifest]
	delete(m.raws, manifest)
	m.mu.Unlock()
	if lw == nil {
		return fmt.Errorf("conceal image %s: %w", manifest, errdefs.ErrNotFound)
	}
	m.server.Remove(lw.rec.Node)
	m.closeFile(lw.file)
	return m.table.removeImage(lw.rec.Node)
}

// Exposed lists the images that have a file.
func (m *Mounter) Exposed() []digest.Digest {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []digest.Digest
	for manifest := range m.raws {
		all = append(all, manifest)
	}
	return all
}
