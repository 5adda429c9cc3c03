package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay/overlayutils"
	"github.com/containerd/continuity/fs"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// lockWait is how long Open waits for another process to let the metadata go.
const lockWait = 10 * time.Second

// undoTime bounds what is done after a call has failed or its context ended.
const undoTime = time.Minute

// Snapshotter is one of containerd's snapshotters. All methods may be called at
// the same time.
type Snapshotter struct {
	cfg     Config
	owners  *Owners
	log     *slog.Logger
	meta    *storage.MetaStore
	mkfs    string   // path of mkfs.ext4; "" when it is not needed
	overlay []string // options of every overlay mount

	refusals refusals

	// links is held while a link in a snapshot's directory is replaced, with
	// the record looked at, and while the directory of one without a record is
	// put aside.
	links sync.Mutex

	mu     sync.Mutex
	drafts map[string]bool // tokens of snapshots being made; protected by mu
}

var (
	_ snapshots.Snapshotter = (*Snapshotter)(nil)
	_ snapshots.Cleaner     = (*Snapshotter)(nil)
)

// Open opens the snapshotter and removes what a crash left behind.
func Open(ctx context.Context, cfg Config) (_ *Snapshotter, err error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.step == nil {
		cfg.step = func(string) {}
	}
	if cfg.lockWait == 0 {
		cfg.lockWait = lockWait
	}
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Snapshotter{cfg: cfg, owners: cfg.Owners, log: cfg.Log.With("snapshotter", cfg.Name), drafts: map[string]bool{}}
	if err := s.openFiles(); err != nil {
		return nil, fmt.Errorf("snapshotter %s: %w", cfg.Name, err)
	}
	if err := s.openState(ctx); err != nil {
		return nil, fmt.Errorf("snapshotter %s: %w", cfg.Name, errors.Join(err, s.Close()))
	}
	return s, nil
}

func (s *Snapshotter) openFiles() error {
	if err := os.MkdirAll(filepath.Join(s.cfg.Root, "snapshots"), 0o700); err != nil {
		return err
	}
	if ok, err := fs.SupportsDType(s.cfg.Root); err != nil || !ok {
		return fmt.Errorf("%s is on a file system that tells no file types (d_type), which overlayfs needs; on XFS make it with ftype=1: %w",
			s.cfg.Root, errors.Join(err, errdefs.ErrFailedPrecondition))
	}
	if s.cfg.uses(Block) && s.cfg.UpperSize > 0 {
		var err error
		if s.mkfs, err = findMkfs(); err != nil {
			return err
		}
	}
	var err error
	s.overlay, err = overlayOptions(s.cfg.Root)
	return err
}

// overlayOptions are those that containerd's overlayfs snapshotter adds too
// (plugins/snapshots/overlay/overlay.go). metacopy, redirect_dir and volatile stay
// as the kernel has them: layers are only ever read through the same kernel.
func overlayOptions(root string) ([]string, error) {
	var options []string
	switch user, err := overlayutils.NeedsUserXAttr(root); {
	case err != nil:
		return nil, fmt.Errorf("does overlayfs need userxattr in %s: %w", root, err)
	case user:
		options = append(options, "userxattr")
	}
	// Only a kernel with the feature knows the option.
	if _, err := os.Stat("/sys/module/overlay/parameters/index"); err == nil {
		options = append(options, "index=off")
	}
	return options, nil
}

func (s *Snapshotter) openState(ctx context.Context) (err error) {
	if s.owners == nil {
		if s.owners, err = OpenOwners(filepath.Join(s.cfg.Root, "owners"), s.cfg.Images, s.log); err != nil {
			return err
		}
		s.owners.step = s.cfg.step
	}
	s.meta, err = storage.NewMetaStore(filepath.Join(s.cfg.Root, "metadata.db"), func(o *bolt.Options) error {
		o.Timeout = s.cfg.lockWait // else a second process would wait for ever
		return nil
	})
	if err != nil {
		return err
	}
	counts, err := s.countImages(ctx)
	if err != nil {
		return err
	}
	if err := s.owners.restore(ctx, s.cfg.Name, counts); err != nil {
		return err
	}
	if err := s.Cleanup(ctx); err != nil {
		// No reason to serve nothing: running containers read from this process.
		s.log.Warn("what was left behind stays for now; Cleanup tries again", "error", err)
	}
	return nil
}

// countImages counts the records of each image.
func (s *Snapshotter) countImages(ctx context.Context) (map[digest.Digest]int, error) {
	counts := map[digest.Digest]int{}
	err := s.walk(ctx, func(_ context.Context, info snapshots.Info, r record) error {
		if info.Kind == snapshots.KindCommitted && r.remote() {
			counts[r.chain.Manifest]++
		}
		return nil
	})
	return counts, err
}

// Close closes the metadata; containers keep their mounts. It may be called
// twice.
func (s *Snapshotter) Close() error {
	if s.meta == nil {
		return nil
	}
	return s.meta.Close()
}

// view runs fn in a transaction that only reads.
func (s *Snapshotter) view(ctx context.Context, fn func(context.Context) error) error {
	err := s.meta.WithTransaction(ctx, false, fn)
	if errors.Is(err, bolterrors.ErrTimeout) {
		return fmt.Errorf("another process has the metadata of snapshotter %s open; stop the other tatami-host: %w", s.cfg.Name, errdefs.ErrFailedPrecondition)
	}
	return err
}

// update runs fn in a transaction that is committed when fn succeeds.
func (s *Snapshotter) update(ctx context.Context, fn func(context.Context) error) error {
	return s.meta.WithTransaction(ctx, true, fn)
}

// path of something in the directory of a snapshot. Precondition: id comes from
// the metadata, or is one of our temporary names.
func (s *Snapshotter) path(id string, name ...string) string {
	return filepath.Join(append([]string{s.cfg.Root, "snapshots", id}, name...)...)
}

// undoing returns a bounded context for cleaning up, whatever happened to ctx.
func undoing(ctx context.Context) (context.Context, context.CancelFunc) {
	return context.WithTimeout(context.WithoutCancel(ctx), undoTime)
}
