package mount

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Path is a way to put EROFS on an image file.
type Path string

// FilePath mounts the file itself (Linux 6.12 with EROFS_FS_BACKED_BY_FILE).
// LoopPath puts a loop device between; it can be switched to a local file.
const (
	FilePath Path = "file"
	LoopPath Path = "loop"
)

// State is how far a mount or an image has come. Only the named transitions
// happen:
//
//	(none) → mounting    by Mount, before any system call
//	mounting → mounted   by Mount, when all is in place
//	mounting → (none)    by Mount when it fails, by Restore when it was cut short
//	mounted → unmounting by Unmount (mounts only)
//	mounted → draining   when the last mount is gone (images only)
//	unmounting → (none)  by Unmount, by Restore when it was cut short
//	draining → (none)    when the kernel closes the file
type State string

// States; see State.
const (
	Mounting   State = "mounting"
	Mounted    State = "mounted"
	Unmounting State = "unmounting"
	Draining   State = "draining"
)

const recordVersion = 1

// Record describes one mount.
type Record struct {
	Version   int           `json:"version"`
	ID        string        `json:"id"`
	Reference string        `json:"reference"` // as the user named the image
	Manifest  digest.Digest `json:"manifest"`
	Target    string        `json:"target"`          // absolute, no symbolic links
	Upper     string        `json:"upper,omitempty"` // "" means a tmpfs
	ReadOnly  bool          `json:"read_only,omitempty"`
	State     State         `json:"state"`
	Path      Path          `json:"path,omitempty"`   // of the lower
	Source    string        `json:"source,omitempty"` // of the lower, see Spec
	Local     string        `json:"local,omitempty"`  // the file that was mounted, "" for one of the session
	Size      int64         `json:"size,omitempty"`   // of the image in bytes
	Created   time.Time     `json:"created"`

	// MountID and Device tell the mount at Target from one that somebody else
	// put there later (mountinfo's first and third field).
	MountID int    `json:"mount_id,omitempty"`
	Device  string `json:"device,omitempty"`
	// MadeTarget: the target directory is removed with the mount.
	MadeTarget bool `json:"made_target,omitempty"`
}

// imageRecord describes one image file and the lower on it.
type imageRecord struct {
	Version   int           `json:"version"`
	Node      uint64        `json:"node"`
	Name      string        `json:"name,omitempty"` // in the session's directory; "" when a local file was mounted
	Manifest  digest.Digest `json:"manifest"`
	Reference string        `json:"reference"`
	Size      int64         `json:"size"` // bytes
	Path      Path          `json:"path,omitempty"`
	Source    string        `json:"source,omitempty"`
	Loop      string        `json:"loop,omitempty"`  // device node, with LoopPath
	Local     string        `json:"local,omitempty"` // file that was mounted, or that the device was switched to
	State     State         `json:"state"`
	// Released: the kernel has closed the session's file, or never had one;
	// nothing reads it.
	Released bool `json:"released,omitempty"`
}

// direct says whether the lower never was on a file of the session.
func (r *imageRecord) direct() bool { return r.Name == "" }

// sessionRecord says which session all other records belong to.
type sessionRecord struct {
	Version  int    `json:"version"`
	Session  string `json:"session"`
	NextNode uint64 `json:"next_node"`
}

// table is the directory that records live in.
type table struct{ dir string }

const (
	mountsDir = "mounts"
	imagesDir = "images"
	lowerDir  = "lower"
	upperDir  = "upper"

	sessionFile = "session.json"
)

func openTable(dir string) (table, error) {
	for _, sub := range []string{mountsDir, imagesDir, lowerDir, upperDir} {
		if err := os.MkdirAll(filepath.Join(dir, sub), 0o700); err != nil {
			return table{}, fmt.Errorf("make state directory: %w", err)
		}
	}
	return table{dir}, nil
}

func (t table) lower(manifest digest.Digest) string {
	return filepath.Join(t.dir, lowerDir, manifest.Encoded())
}
func (t table) upper(id string) string { return filepath.Join(t.dir, upperDir, id) }

func (t table) saveMount(r *Record) error {
	return t.save(filepath.Join(mountsDir, r.ID+".json"), r)
}
func (t table) removeMount(id string) error {
	return t.remove(filepath.Join(mountsDir, id+".json"))
}
func (t table) saveImage(r *imageRecord) error {
	return t.save(imageFile(r.Node), r)
}
func (t table) removeImage(node uint64) error { return t.remove(imageFile(node)) }

func imageFile(node uint64) string {
	return filepath.Join(imagesDir, strconv.FormatUint(node, 10)+".json")
}

// save replaces a record in one step. It is not synced: it has to survive this
// process, not the kernel.
func (t table) save(name string, v any) error {
	b, err := json.MarshalIndent(v, "", "\t")
	if err != nil {
		return fmt.Errorf("encode record %s: %w", name, err)
	}
	path := filepath.Join(t.dir, name)
	tmp := path + ".tmp"
	if err := os.WriteFile(tmp, append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("write record: %w", err)
	}
	return nil
}

func (t table) remove(name string) error {
	if err := os.Remove(filepath.Join(t.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("remove record: %w", err)
	}
	return nil
}

func (t table) loadSession() (sessionRecord, error) {
	r, err := load[sessionRecord](filepath.Join(t.dir, sessionFile))
	if errors.Is(err, os.ErrNotExist) {
		return sessionRecord{}, nil
	}
	return r, err
}

// load reads one record.
func load[T any](path string) (T, error) {
	var r T
	b, err := os.ReadFile(path)
	if err != nil {
		return r, fmt.Errorf("read record: %w", err)
	}
	var v struct {
		Version int `json:"version"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return r, fmt.Errorf("parse record %s: %w: %w", path, err, errdefs.ErrDataLoss)
	}
	if v.Version != recordVersion {
		return r, fmt.Errorf("record %s has version %d, this program writes %d: %w", path, v.Version, recordVersion, errdefs.ErrDataLoss)
	}
	if err := json.Unmarshal(b, &r); err != nil {
		return r, fmt.Errorf("parse record %s: %w: %w", path, err, errdefs.ErrDataLoss)
	}
	return r, nil
}

// loadAll reads every record of a folder. Unreadable ones are returned as
// errors beside the readable.
func loadAll[T any](dir string) ([]T, error) {
	files, err := os.ReadDir(dir)
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("read mount table: %w", err)
	}
	var all []T
	var bad error
	for _, f := range files {
		if !strings.HasSuffix(f.Name(), ".json") {
			continue // half-written
		}
		r, err := load[T](filepath.Join(dir, f.Name()))
		if err != nil {
			bad = errors.Join(bad, err)
			continue
		}
		all = append(all, r)
	}
	return all, bad
}
