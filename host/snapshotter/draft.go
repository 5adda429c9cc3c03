package snapshotter

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
)

// Names in the directory of a snapshot. The Go runtime and containerd's
// snapshotters call the image for writes "rwlayer.img" too.
const (
	upperDir  = "fs"
	workDir   = "work"
	lowerLink = "lower"  // to where the node mounts the image; an empty directory when it cannot
	usersDir  = `\lower` // the image's users and groups; see lowerOption
	upperFile = "rwlayer.img"
	// guestDir has an upper and a work directory for the VM itself, which Kata calls
	// "fs" and "work" too. All names in it are the guest's to change, so nothing on
	// the host may follow them: what the host needs is not there.
	guestDir = "guest"
)

const (
	draftPrefix = "new-"
	trashPrefix = "old-"
)

// draft is a snapshot being made, in a directory with a temporary name.
type draft struct {
	s       *Snapshotter
	request *request
	base    base
	token   string // random; of the directory and the holder
	record  record
	given   given
	upper   bool // there is an image for writes
}

// given is what the node gives a snapshot.
type given struct {
	lower string // where the image is mounted; "" when it is not
	tree  Tree   // of lower, while the snapshot is made
	file  string // the one-file image
}

func (s *Snapshotter) newDraft(r *request, b base) *draft {
	d := &draft{s: s, request: r, base: b, token: strings.ToLower(rand.Text())}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.drafts[d.token] = true
	return d
}

// close undoes everything when err says that the snapshot was not made.
func (d *draft) close(ctx context.Context, err error) {
	if err != nil {
		ctx, cancel := undoing(ctx)
		defer cancel()
		if err := errors.Join(d.release(ctx), os.RemoveAll(d.path())); err != nil {
			d.s.log.Warn("a snapshot that was not made left something behind; Cleanup tries again", "key", d.request.key, "error", err)
		}
	}
	d.s.mu.Lock()
	defer d.s.mu.Unlock()
	delete(d.s.drafts, d.token)
}

func (d *draft) path(name ...string) string {
	return d.s.path(draftPrefix+d.token, name...)
}

func (d *draft) release(ctx context.Context) error {
	if d.record.holder == "" {
		return nil
	}
	return d.s.cfg.Images.Release(ctx, d.record.holder)
}

// furnish makes the directory in the first mode that works.
func (d *draft) furnish(ctx context.Context) error {
	if err := os.Mkdir(d.path(), 0o700); err != nil {
		return err
	}
	d.s.cfg.step("directory")
	if err := d.makeUpper(); err != nil {
		return err
	}
	tries, reason := d.s.plan(d.request, d.base)
	d.record.reason = reason
	d.record.chain = d.base.chain
	for i, mode := range tries {
		err := d.take(ctx, mode)
		if err == nil {
			break
		}
		if ctx.Err() != nil || i == len(tries)-1 || errdefs.IsInvalidArgument(err) {
			return fmt.Errorf("mode %s: %w", mode, err)
		}
		if err := d.release(ctx); err != nil {
			return err
		}
		d.s.log.Warn("a container gets another mode", "key", d.request.key, "mode", mode, "next", tries[i+1], "error", err)
		d.record.reason = reasonOf(fmt.Errorf("%s: %w", mode, err))
	}
	return d.adopt()
}

// makeUpper makes the directories for writes, as containerd's overlayfs
// snapshotter does.
func (d *draft) makeUpper() error {
	return makeWritable(d.path(), d.request.kind == snapshots.KindActive)
}

func makeWritable(dir string, work bool) error {
	upper := filepath.Join(dir, upperDir)
	if err := os.Mkdir(upper, 0o755); err != nil {
		return err
	}
	if err := os.Chmod(upper, 0o755); err != nil || !work { // whatever the umask
		return err
	}
	return os.Mkdir(filepath.Join(dir, workDir), 0o711)
}

// makeGuestDir makes the directory that a VM gets.
func (d *draft) makeGuestDir() error {
	if err := os.Mkdir(d.path(guestDir), 0o700); err != nil {
		return err
	}
	return makeWritable(d.path(guestDir), true)
}

// take asks the node for what the mode needs.
func (d *draft) take(ctx context.Context, mode Mode) (err error) {
	d.record.mode = mode
	if d.record.remote() {
		d.record.holder = d.s.cfg.Name + "." + d.token
		if d.given, err = d.s.hold(ctx, d.record); err != nil {
			return err
		}
		d.s.cfg.step("held")
	}
	switch {
	case mode == Block && d.request.kind == snapshots.KindActive:
		return d.makeUpperFile(ctx)
	case mode == Nydus && d.request.kind == snapshots.KindActive:
		if err := d.makeGuestDir(); err != nil {
			return err
		}
		return d.takeTree(ctx)
	case d.given.lower != "":
		return d.takeTree(ctx)
	case mode == Guest:
		return os.Mkdir(d.path(lowerLink), 0o755)
	}
	return nil
}

// takeTree links to the image that the node mounts, and copies its users.
func (d *draft) takeTree(ctx context.Context) (err error) {
	users := []string{"etc/passwd", "etc/group"}
	if d.record.mode == Guest || d.record.mode == Nydus {
		users = nil // nobody reads the image here unless containerd asks the helper
	}
	if d.given.tree, err = d.s.cfg.Images.Look(ctx, d.given.lower, users...); err != nil {
		return err
	}
	if err := os.Symlink(d.given.lower, d.path(lowerLink)); err != nil || users == nil {
		return err
	}
	if err := os.MkdirAll(d.path(usersDir, "etc"), 0o755); err != nil {
		return err
	}
	for name, content := range d.given.tree.Files {
		if err := os.WriteFile(d.path(usersDir, name), content, 0o644); err != nil { //nolint:gosec // as in the image
			return err
		}
	}
	return nil
}

// hold asks the node for what a snapshot with the record needs. Again for the
// same holder, it gets the same.
func (s *Snapshotter) hold(ctx context.Context, r record) (g given, err error) {
	if r.mode == Block {
		g.file, err = s.cfg.Images.File(ctx, r.holder, r.chain)
		return g, err
	}
	g.lower, err = s.cfg.Images.Mount(ctx, r.holder, r.chain)
	if r.mode == Guest && errdefs.IsNotImplemented(err) {
		// The guest does not need it; containerd finds no /etc/passwd then.
		s.log.Warn("the host cannot mount images, so users of containers need numbers", "manifest", r.chain.Manifest, "error", err)
		return given{}, nil
	}
	return g, err
}

// adopt gives the upper directories the owner and mode of the directory that they
// cover, the image's root.
func (d *draft) adopt() error {
	uid, gid, mapped, err := mappedRoot(d.request.labels)
	covered, ok, serr := d.covered()
	if err = errors.Join(err, serr); err != nil || !ok && !mapped {
		return err
	}
	if ok && !mapped {
		uid, gid = covered.UID, covered.GID
	}
	for _, dir := range d.uppers() {
		if ok {
			err = os.Chmod(dir, covered.Mode)
		}
		if err = errors.Join(err, os.Lchown(dir, uid, gid)); err != nil {
			return err
		}
	}
	return nil
}

func (d *draft) uppers() []string {
	if d.record.mode == Nydus && d.request.kind == snapshots.KindActive {
		return []string{d.path(upperDir), d.path(guestDir, upperDir)}
	}
	return []string{d.path(upperDir)}
}

// covered describes the directory that the upper one covers, if there is one.
func (d *draft) covered() (root Tree, ok bool, err error) {
	if len(d.base.full) == 0 {
		return d.given.tree, d.given.lower != "", nil
	}
	st, err := os.Stat(d.s.path(d.base.full[0], upperDir))
	if err != nil {
		return root, false, err
	}
	sys, ok := st.Sys().(*syscall.Stat_t)
	if !ok {
		return root, false, nil
	}
	return Tree{UID: int(sys.Uid), GID: int(sys.Gid), Mode: st.Mode()}, true, nil
}

// insert writes the record and gives the directory its name. When the metadata
// does not keep it after all, the directory is a leftover: its number may
// already be another one's.
func (d *draft) insert(ctx context.Context) (id string, err error) {
	err = d.s.update(ctx, func(ctx context.Context) error {
		r := d.request
		made, err := storage.CreateSnapshot(ctx, r.kind, r.key, r.parent, snapshots.WithLabels(d.record.addTo(r.labels)))
		if err != nil {
			return fmt.Errorf("create snapshot %q: %w", r.key, err)
		}
		now, err := find(ctx, r.parent)
		if err != nil {
			return err
		}
		if !slices.Equal(now.full, d.base.full) || now.chain != d.base.chain {
			return fmt.Errorf("parent %q of snapshot %q was replaced meanwhile; try again: %w", r.parent, r.key, errdefs.ErrUnavailable)
		}
		id = made.ID
		d.s.cfg.step("inserted")
		return d.rename(id)
	})
	return id, err
}

// rename gives the directory the name of the record. A transaction that failed
// may have left a directory there: without a record it is nobody's.
func (d *draft) rename(id string) error {
	if err := os.RemoveAll(d.s.path(id)); err != nil {
		return err
	}
	if err := os.Rename(d.path(), d.s.path(id)); err != nil {
		return err
	}
	d.s.cfg.step("renamed")
	return nil
}

func (d *draft) layout(id string) layout {
	return layout{id: id, kind: d.request.kind, record: d.record, base: d.base, given: d.given, upper: d.upper, unpack: d.request.unpack}
}

// link points the snapshot's link to where the image is mounted now.
// Precondition: s.links is held.
func (s *Snapshotter) link(id, lower string) error {
	path := s.path(id, lowerLink)
	switch now, err := os.Readlink(path); {
	case err == nil && now == lower:
		return nil
	case errors.Is(err, syscall.EINVAL): // the directory of a host that could not mount
		if err := os.Remove(path); err != nil {
			return err
		}
	}
	temp := path + ".new"
	if err := os.Remove(temp); err != nil && !errors.Is(err, fs.ErrNotExist) { // of a crash
		return err
	}
	if err := os.Symlink(lower, temp); err != nil {
		return err
	}
	return os.Rename(temp, path)
}
