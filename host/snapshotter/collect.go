package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
)

// leftovers are what was there before the records were read. What has no
// record then, and is not being made, is nobody's: what is made later has
// another name.
type leftovers struct {
	dirs    []string
	holders []string
	drafts  map[string]bool
}

// Cleanup removes what crashes and failures left behind: directories and
// holders without a record, records without a directory, images that nobody
// uses. containerd calls it after each garbage collection.
func (s *Snapshotter) Cleanup(ctx context.Context) error {
	l, err := s.leftovers(ctx)
	if err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	var lost []record
	err = s.update(ctx, func(ctx context.Context) error {
		if lost, err = s.dropLost(ctx); err != nil {
			return err
		}
		return s.sift(ctx, &l)
	})
	if err != nil {
		return fmt.Errorf("clean up: %w", err)
	}
	var errs []error
	for _, d := range l.dirs {
		errs = append(errs, os.RemoveAll(s.path(d)))
	}
	for _, h := range l.holders {
		errs = append(errs, s.cfg.Images.Release(ctx, h))
	}
	for _, r := range lost {
		s.letGo(ctx, r.holder)
	}
	errs = append(errs, s.owners.Collect(ctx))
	return errors.Join(errs...)
}

func (s *Snapshotter) leftovers(ctx context.Context) (l leftovers, err error) {
	holders, err := s.cfg.Images.Holders(ctx)
	if err != nil {
		return l, err
	}
	for _, h := range holders {
		if strings.HasPrefix(h, s.cfg.Name+".") {
			l.holders = append(l.holders, h)
		}
	}
	entries, err := os.ReadDir(filepath.Join(s.cfg.Root, "snapshots"))
	for _, e := range entries {
		l.dirs = append(l.dirs, e.Name())
	}
	// After the lists: what is not among these has a record by now, or is gone.
	s.mu.Lock()
	defer s.mu.Unlock()
	l.drafts = maps.Clone(s.drafts)
	return l, err
}

// dropLost removes the records whose directory is gone and that nothing lies
// on. Precondition: ctx has a writable transaction, in which every record has
// its directory.
func (s *Snapshotter) dropLost(ctx context.Context) (lost []record, err error) {
	ids, err := storage.IDMap(ctx)
	if err != nil && !errdefs.IsNotFound(err) {
		return nil, err
	}
	for id, key := range ids {
		_, info, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return nil, err
		}
		r, err := readRecord(info.Labels)
		if err != nil {
			return nil, fmt.Errorf("snapshot %q: %w", key, err)
		}
		if _, err := os.Lstat(s.path(id)); !errors.Is(err, fs.ErrNotExist) || info.Kind == snapshots.KindCommitted && r.remote() {
			continue
		}
		s.log.Error("the directory of a snapshot is gone", "key", key, "directory", s.path(id))
		switch _, _, err := storage.Remove(ctx, key); {
		case err == nil:
			lost = append(lost, r)
		case !errdefs.IsFailedPrecondition(err):
			return nil, err
		}
	}
	return lost, nil
}

// sift leaves in l what is to be removed. A directory with a number gets another
// name at once: a record may get that number next. Precondition: ctx has a
// writable transaction.
func (s *Snapshotter) sift(ctx context.Context, l *leftovers) error {
	used, ids := map[string]bool{}, map[string]bool{}
	for token := range l.drafts {
		used[s.cfg.Name+"."+token], ids[draftPrefix+token] = true, true
	}
	all, err := storage.IDMap(ctx)
	if err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	for id, key := range all {
		_, info, _, err := storage.GetInfo(ctx, key)
		if err != nil {
			return err
		}
		ids[id], used[info.Labels[labelHolder]] = true, true
	}
	l.holders = without(l.holders, used)
	l.dirs = without(l.dirs, ids)
	for i, name := range l.dirs {
		if l.dirs[i], err = s.putAside(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}

// without returns what of all is not in used.
func without(all []string, used map[string]bool) []string {
	var out []string
	for _, s := range all {
		if !used[s] {
			out = append(out, s)
		}
	}
	return out
}
