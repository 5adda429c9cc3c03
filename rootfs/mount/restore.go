package mount

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/mount/imagefs"
)

// Restore takes the mount table over from the worker before. It reads nothing
// from the session and is called once, before Serve.
//
// Records of this session come back to life, with images from open; an image
// that open cannot give now is asked for again when it is read. open gets the
// record of one mount of the image; when readers are left but no mount, a
// record with Manifest, Reference and Size only. What was half mounted or half
// unmounted is removed. Records of another session describe dead mounts, which
// are removed too.
func (m *Mounter) Restore(ctx context.Context, open func(Record) (File, error)) error {
	s, err := m.table.loadSession()
	if err != nil {
		m.log.Error("mount table is unreadable and starts anew", "err", err)
	}
	if s.Session != m.cfg.Link.ID() {
		if s.Session != "" {
			m.log.Warn("mounts of a session that has ended are removed", "state_dir", m.table.dir)
		}
		if err := Clean(m.table.dir, m.log); err != nil {
			return err
		}
		s = sessionRecord{Version: recordVersion, Session: m.cfg.Link.ID(), NextNode: firstNode}
		if err := m.table.save(sessionFile, &s); err != nil {
			return err
		}
	}
	m.mu.Lock()
	m.session = s
	m.mu.Unlock()
	return m.restore(ctx, open)
}

func (m *Mounter) restore(ctx context.Context, open func(Record) (File, error)) error {
	mounts, err := readMounts()
	if err != nil {
		return err
	}
	images, bad := loadAll[imageRecord](filepath.Join(m.table.dir, imagesDir))
	m.logUndone("image records are unreadable and ignored", bad)
	records, bad := loadAll[Record](filepath.Join(m.table.dir, mountsDir))
	m.logUndone("mount records are unreadable and ignored", bad)
	for _, img := range images {
		if err := m.restoreImage(img, mounts, records, open); err != nil {
			return err
		}
	}
	for _, rec := range records {
		if err := m.restoreMount(ctx, rec, mounts); err != nil {
			m.log.Error("mount is not restored", "id", rec.ID, "err", err)
		}
	}
	return m.dropUnused()
}

// restoreImage serves an image again, or removes a half-made lower. The nodes
// of those are not served: what still waits for them gets an error.
func (m *Mounter) restoreImage(img imageRecord, mounts mountTable, records []Record, open func(Record) (File, error)) error {
	if img.State == Mounting {
		return errors.Join(removeLowerDir(m.table.lower(img.Manifest)), m.table.removeImage(img.Node))
	}
	lw := newLower(img, nil)
	if img.Path == RawPath {
		lw.file = m.reopen(img, records, open)
		return m.addRaw(lw)
	}
	if img.Released {
		close(lw.released)
	} else {
		lw.file = m.reopen(img, records, open)
		if err := m.server.Add(imagefs.Node{ID: img.Node, Name: img.Name, Reference: img.Reference, File: lw.file, Sealed: true}); err != nil {
			return err
		}
	}
	m.mu.Lock()
	defer m.mu.Unlock()
	if img.State == Draining || !mounts.has(m.table.lower(img.Manifest)) {
		if img.Released {
			return m.table.removeImage(img.Node)
		}
		lw.rec.State = Draining
		m.draining[img.Node] = lw
		return m.table.saveImage(&lw.rec)
	}
	m.lowers[img.Manifest] = lw
	return nil
}

// restoreMount keeps a mount that is whole and undoes any other.
func (m *Mounter) restoreMount(ctx context.Context, rec Record, mounts mountTable) error {
	if err := validateID(rec.ID); err != nil {
		return err
	}
	m.mu.Lock()
	m.mounts[rec.ID] = &rec
	if lw := m.lowers[rec.Manifest]; lw != nil {
		lw.refs++
	}
	m.mu.Unlock()
	if rec.State == Mounted && mounts.holds(&rec) {
		return nil
	}
	m.log.Info("mount was left half done, or was unmounted meanwhile; it is released", "id", rec.ID, "state", rec.State)
	return m.unmount(ctx, rec)
}

// dropUnused unmounts lowers that no mount refers to: their mount was cut off
// before it had a top.
func (m *Mounter) dropUnused() error {
	m.mu.Lock()
	var unused []*lower
	for _, lw := range m.lowers {
		if lw.refs == 0 {
			unused = append(unused, lw)
		}
	}
	m.mu.Unlock()
	var errs error
	for _, lw := range unused {
		errs = errors.Join(errs, m.unmountLower(lw))
	}
	return errs
}

// reopen asks for an image, and puts one in its place that will ask again when
// there is none.
func (m *Mounter) reopen(img imageRecord, records []Record, open func(Record) (File, error)) File {
	rec := Record{Manifest: img.Manifest, Reference: img.Reference}
	for _, r := range records {
		if r.Manifest == img.Manifest {
			rec = r
			break
		}
	}
	rec.Size = img.Size
	f := &lateFile{open: func() (File, error) { return open(rec) }, size: img.Size, now: time.Now}
	if _, err := f.get(); err != nil {
		m.log.Error("image cannot be opened again now; its readers get errors until it can", "reference", img.Reference, "err", err)
	}
	return f
}

// lateFile is an image that is opened when it can be.
type lateFile struct {
	open func() (File, error)
	size int64
	now  func() time.Time

	mu     sync.Mutex
	file   File
	err    error     // of the last try
	tried  time.Time // when that was
	closed bool
}

// askEvery is how often a lateFile asks for its image.
const askEvery = time.Second

func (f *lateFile) Size() int64 { return f.size }

func (f *lateFile) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	file, err := f.get()
	if err != nil {
		return 0, err
	}
	return file.ReadAt(ctx, p, off)
}

// ReadNow implements imagefs.Ready; it does not wait for the image to be opened.
func (f *lateFile) ReadNow(p []byte, off int64) bool {
	if !f.mu.TryLock() {
		return false
	}
	file, ok := f.file.(imagefs.Ready)
	f.mu.Unlock()
	return ok && file.ReadNow(p, off)
}

func (f *lateFile) get() (File, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.file != nil || f.closed || f.err != nil && f.now().Sub(f.tried) < askEvery {
		return f.file, f.err
	}
	f.tried = f.now()
	file, err := f.open()
	if err == nil && file.Size() != f.size {
		err = fmt.Errorf("image has %d bytes now and had %d when it was mounted: %w", file.Size(), f.size, errdefs.ErrDataLoss)
		err = errors.Join(err, closeFile(file))
	}
	if err != nil {
		f.err = fmt.Errorf("open image again: %w", err)
		return nil, f.err
	}
	f.file, f.err = file, nil
	return file, nil
}

// Close closes the image if it was opened.
func (f *lateFile) Close() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	file := f.file
	f.closed, f.file, f.err = true, nil, os.ErrClosed
	return closeFile(file)
}

// Clean unmounts everything that the records in a state directory describe and
// removes them. It reads no image and needs no session: it is for a supervisor
// whose worker is gone, and for what an earlier supervisor left.
func Clean(stateDir string, log *slog.Logger) error {
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	t, err := openTable(stateDir)
	if err != nil {
		return err
	}
	mounts, err := readMounts()
	if err != nil {
		return err
	}
	m := &Mounter{table: t}
	records, bad := loadAll[Record](filepath.Join(stateDir, mountsDir))
	if bad != nil {
		log.Error("mount records are unreadable and removed", "err", bad)
	}
	var errs error
	for _, rec := range records {
		ours := mounts.holds(&rec) || rec.State == Mounting
		errs = errors.Join(errs, m.removeTop(&rec, ours))
	}
	return errors.Join(errs, cleanDir(t.dir, upperDir), cleanDir(t.dir, lowerDir), cleanRecords(t.dir))
}

// cleanDir unmounts and removes every mount point of a folder.
func cleanDir(stateDir, folder string) error {
	dir := filepath.Join(stateDir, folder)
	entries, err := os.ReadDir(dir)
	if err != nil {
		return fmt.Errorf("clean mount table: %w", err)
	}
	var errs error
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if err := detach(path); err != nil {
			errs = errors.Join(errs, err)
			continue
		}
		// Remove, not RemoveAll: nothing below may belong to somebody else.
		errs = errors.Join(errs, os.Remove(path))
	}
	return errs
}

func cleanRecords(stateDir string) error {
	var errs error
	for _, folder := range []string{mountsDir, imagesDir} {
		dir := filepath.Join(stateDir, folder)
		entries, err := os.ReadDir(dir)
		errs = errors.Join(errs, err)
		for _, e := range entries {
			errs = errors.Join(errs, os.Remove(filepath.Join(dir, e.Name())))
		}
	}
	if err := os.Remove(filepath.Join(stateDir, sessionFile)); err != nil && !errors.Is(err, os.ErrNotExist) {
		errs = errors.Join(errs, err)
	}
	return errs
}
