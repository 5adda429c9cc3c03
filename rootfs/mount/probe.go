package mount

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"slices"
	"sync"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/mount/imagefs"
	"github.com/tatami-containers/tatami/rootfs/mount/thread"
)

// probe remembers which paths this kernel can do.
type probe struct {
	mu    sync.Mutex
	done  bool
	works []Path
	why   error // of those that do not work
}

// Paths returns the ways in which this kernel can mount images, the preferred
// one first. The first call finds out by mounting an image of one block on the
// session (a few milliseconds); it needs Serve to be running.
func (m *Mounter) Paths(ctx context.Context) ([]Path, error) { return m.paths(ctx) }

func (m *Mounter) paths(ctx context.Context) ([]Path, error) {
	m.probe.mu.Lock()
	defer m.probe.mu.Unlock()
	if !m.probe.done {
		if err := m.tryPaths(ctx); err != nil {
			return nil, err
		}
	}
	if len(m.probe.works) == 0 {
		return nil, fmt.Errorf("this kernel can mount images in no way (needed: EROFS, and file-backed mounts or loop devices): %w: %w",
			m.probe.why, errdefs.ErrFailedPrecondition)
	}
	return slices.Clone(m.probe.works), nil
}

// tryPaths fills m.probe. Precondition: probe.mu is held.
func (m *Mounter) tryPaths(ctx context.Context) error {
	order := []Path{FilePath, LoopPath}
	if m.cfg.Prefer == LoopPath {
		slices.Reverse(order)
	}
	var works []Path
	var why error
	for _, p := range order {
		err := m.tryTiny(ctx, p)
		if ctx.Err() != nil {
			return fmt.Errorf("find out how to mount: %w", ctx.Err())
		}
		if err == nil {
			works = append(works, p)
			continue
		}
		m.log.Warn("a way to mount images does not work here", "path", p, "err", err)
		why = errors.Join(why, fmt.Errorf("%s: %w", p, err))
	}
	// Where nothing works the reason may pass: out of memory, a module to come.
	m.probe.done, m.probe.works, m.probe.why = len(works) > 0, works, why
	return nil
}

// tryTiny mounts the tiny image one way, nowhere.
func (m *Mounter) tryTiny(ctx context.Context, p Path) error {
	node, err := m.newNode()
	if err != nil {
		return err
	}
	name := fmt.Sprintf("probe-%d.erofs", node)
	if err := m.server.Add(imagefs.Node{ID: node, Name: name, File: tinyImage()}); err != nil {
		return err
	}
	defer m.server.Remove(node)
	stop := context.AfterFunc(ctx, func() { m.server.Abort(node) })
	defer stop()
	return thread.Isolated(func() error {
		_, fd, err := newLowerMount(ctx, p, m.filePath(name), blockSize)
		if err != nil {
			return err
		}
		return unix.Close(fd)
	})
}

const blockSize = 4096

// memoryFile is an image in memory.
type memoryFile []byte

func (f memoryFile) Size() int64 { return int64(len(f)) }

func (f memoryFile) ReadAt(_ context.Context, p []byte, off int64) (int, error) {
	if off < 0 || off > int64(len(f)) {
		return 0, io.EOF
	}
	n := copy(p, f[off:])
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

// tinyImage is the smallest EROFS: a superblock and an empty root directory
// (Documentation/filesystems/erofs.rst; struct erofs_super_block and
// erofs_inode_compact of fs/erofs/erofs_fs.h).
func tinyImage() memoryFile {
	const (
		superOffset = 1024
		rootNID     = 40 // in slots of 32 bytes, behind the superblock
		dirMode     = 0o040755
	)
	b := make(memoryFile, blockSize)
	le := binary.LittleEndian
	sb := b[superOffset:]
	le.PutUint32(sb[0:], erofsMagic)
	sb[12] = 12 // log2 of the block size
	le.PutUint16(sb[14:], rootNID)
	le.PutUint64(sb[16:], 1) // inodes
	le.PutUint32(sb[36:], 1) // blocks
	inode := b[rootNID*32:]
	le.PutUint16(inode[4:], dirMode)
	le.PutUint16(inode[6:], 2) // links
	le.PutUint32(inode[20:], 1)
	return b
}
