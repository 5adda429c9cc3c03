package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/store"
)

// bounds of the store in bytes, 0 is none; and of compressed blobs, 0 keeps none.
type bounds struct{ quota, high, low, blobs int64 }

// blobShare is which part of the quota compressed blobs may take at most, one of so
// many.
const blobShare = 8

// bounds works out what may be taken of the file system that the node lies on. The
// quota is for all of it, compressed blobs included. Precondition: the node's
// directory exists.
func (n *Node) bounds() (b bounds, err error) {
	b.blobs = n.cfg.Blobs
	if n.cfg.Quota == nil {
		return b, nil
	}
	var st unix.Statfs_t
	if err := unix.Statfs(n.cfg.Root, &st); err != nil {
		return b, fmt.Errorf("find out how large the disk is: %w", err)
	}
	if b.quota, err = n.cfg.Quota(int64(st.Blocks) * st.Bsize); b.quota > 0 {
		b.blobs = min(b.blobs, b.quota/blobShare)
		b.quota -= b.blobs
	}
	b.high, b.low = b.quota/100*int64(n.cfg.High), b.quota/100*int64(n.cfg.Low)
	return b, err
}

const (
	maxPins    = 1000    // patterns of Pin
	maxPinned  = 1 << 20 // bytes of their file
	maxPattern = 4096    // bytes of one
)

// Match says whether a reference is one of those that a pattern means: NAME,
// NAME:TAG or NAME@DIGEST, where "*" in name and tag stands for any characters but
// "/", as path.Match has it. A pattern without a tag means all of its repository, and
// so does the tag "*". Names are completed like those of references
// ("busybox" is docker.io/library/busybox). A pattern that is none matches nothing.
func Match(pattern string, ref reference.Named) bool {
	name, tag, sum := splitPattern(pattern)
	if ok, err := path.Match(name, ref.Name()); err != nil || !ok {
		return false
	}
	if d, ok := ref.(reference.Digested); sum != "" {
		return ok && d.Digest().String() == sum
	}
	t, tagged := ref.(reference.Tagged)
	if tag == "" || tag == "*" {
		return true
	}
	if !tagged {
		return false
	}
	ok, err := path.Match(tag, t.Tag())
	return err == nil && ok
}

// splitPattern completes the name as image.ParseReference does that of a reference.
func splitPattern(pattern string) (name, tag, sum string) {
	name, sum, _ = strings.Cut(pattern, "@")
	if i := strings.LastIndexByte(name, ':'); i > strings.LastIndexByte(name, '/') {
		name, tag = name[:i], name[i+1:]
	}
	host, _, ok := strings.Cut(name, "/")
	switch {
	case !ok:
		name = "docker.io/library/" + name
	case !strings.ContainsAny(host, ".:*") && host != "localhost":
		name = "docker.io/" + name
	}
	return name, tag, sum
}

// CheckPattern fails with ErrInvalidArgument for a pattern that can match nothing.
func CheckPattern(pattern string) error {
	name, tag, sum := splitPattern(pattern)
	_, nerr := path.Match(name, "")
	_, terr := path.Match(tag, "")
	err := errors.Join(nerr, terr)
	if sum != "" {
		err = errors.Join(err, digest.Digest(sum).Validate())
	}
	if pattern == "" || len(pattern) > maxPattern || strings.ContainsAny(pattern, " \t\r\n") || err != nil {
		return fmt.Errorf("%.128q: give a reference, as registry.k8s.io/pause:* or busybox: %w", pattern, errdefs.ErrInvalidArgument)
	}
	return nil
}

// Pin has the bytes of the images that a pattern means, now and later, never given
// up. It is remembered. It is no error when that is so already.
func (n *Node) Pin(pattern string) error {
	if err := CheckPattern(pattern); err != nil {
		return fmt.Errorf("pin %w", err)
	}
	n.pinning.Lock()
	defer n.pinning.Unlock()
	if slices.Contains(n.pinned, pattern) {
		return nil
	}
	if len(n.pinned) >= maxPins {
		return fmt.Errorf("pin %s: there are %d patterns already; unpin some: %w", pattern, maxPins, errdefs.ErrResourceExhausted)
	}
	return n.setPinned(append(slices.Clone(n.pinned), pattern))
}

// Unpin takes back what Pin was given. ErrNotFound when it was not;
// ErrFailedPrecondition for what the settings pin.
func (n *Node) Unpin(pattern string) error {
	n.pinning.Lock()
	defer n.pinning.Unlock()
	if i := slices.Index(n.pinned, pattern); i >= 0 {
		return n.setPinned(slices.Delete(slices.Clone(n.pinned), i, i+1))
	}
	if slices.Contains(n.cfg.Pinned, pattern) {
		return fmt.Errorf("unpin %s: the settings pin it; change store.pinned there: %w", pattern, errdefs.ErrFailedPrecondition)
	}
	return fmt.Errorf("unpin %.128q: it is not pinned: %w", pattern, errdefs.ErrNotFound)
}

// Pinned lists the patterns of the settings and of Pin.
func (n *Node) Pinned() []string {
	n.pinning.Lock()
	defer n.pinning.Unlock()
	return slices.Concat(n.cfg.Pinned, n.pinned)
}

// Space is what the node's store takes of the disk.
func (n *Node) Space() store.Space { return n.store.Space() }

func (n *Node) pinnedPath() string { return filepath.Join(n.cfg.Root, "pinned.json") }

// setPinned makes the patterns of Pin these. Precondition: pinning is held.
func (n *Node) setPinned(patterns []string) error {
	data, err := json.Marshal(patterns)
	if err == nil {
		err = n.files.write(n.pinnedPath(), data)
	}
	if err != nil {
		return fmt.Errorf("remember what is pinned: %w", err)
	}
	n.pinned = patterns
	return n.applyPinned()
}

// restorePinned reads what Pin was given. A damaged file pins nothing.
func (n *Node) restorePinned() error {
	n.pinning.Lock()
	defer n.pinning.Unlock()
	data, err := readBounded(n.pinnedPath(), maxPinned)
	if err == nil {
		err = json.Unmarshal(data, &n.pinned)
	}
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		n.pinned = nil
		n.log.Warn("what was pinned is lost; pin it again", "path", n.pinnedPath(), "error", err)
	}
	return n.applyPinned()
}

// repin tells the store which images are pinned, after references were prepared or
// forgotten.
func (n *Node) repin() {
	n.pinning.Lock()
	defer n.pinning.Unlock()
	if err := n.applyPinned(); err != nil {
		n.log.Warn("what is pinned cannot be found out", "error", err)
	}
}

// applyPinned does repin's work. Precondition: pinning is held.
func (n *Node) applyPinned() error {
	patterns := slices.Concat(n.cfg.Pinned, n.pinned)
	if len(patterns) == 0 {
		n.store.SetPinned()
		return nil
	}
	entries, err := os.ReadDir(n.files.refs())
	if err != nil {
		return err
	}
	var found []digest.Digest
	for _, e := range entries {
		m, err := readMeaning(filepath.Join(n.files.refs(), e.Name()))
		if err != nil {
			continue // as meant finds it
		}
		ref, err := image.ParseReference(m.Reference)
		if err == nil && slices.ContainsFunc(patterns, func(p string) bool { return Match(p, ref) }) {
			found = append(found, m.Manifest)
		}
	}
	n.store.SetPinned(found...)
	return nil
}
