package node

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/image"
)

// target is one thing that can be prepared.
type target struct {
	reference string // normalised
	platform  string // "" is the node's own
	// only is the manifest that it has to mean, else it is not prepared; ""
	// takes any. It is not remembered.
	only digest.Digest
}

// meaning is what a target meant when it was prepared last.
type meaning struct {
	Reference string
	Platform  string
	Top       digest.Digest // what the registry has under the reference: an index or the manifest
	Manifest  digest.Digest
}

const maxMeaning = 16 << 10 // bytes of a file

// path is made of a digest, as a reference may be longer than a file name.
func (n *Node) refPath(t target) string {
	key := digest.FromString(t.reference + "\n" + t.platform)
	return filepath.Join(n.files.refs(), key.Encoded()+".json")
}

// meant returns what t meant when it was prepared last; nil when it was not or
// its image is gone.
func (n *Node) meant(t target) *meaning {
	m, err := readMeaning(n.refPath(t))
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			n.log.Warn("a reference's last meaning cannot be read", "reference", t.reference, "error", err)
		}
		return nil
	}
	r, ok := n.known(m.Manifest)
	if !ok || m.Reference != t.reference || m.Platform != t.platform {
		return nil
	}
	if ref, err := image.ParseReference(t.reference); err != nil || !r.countsFor(ref) {
		return nil
	}
	return m
}

func readMeaning(path string) (*meaning, error) {
	data, err := readBounded(path, maxMeaning)
	if err != nil {
		return nil, err
	}
	m := new(meaning)
	if err := json.Unmarshal(data, m); err != nil {
		return nil, fmt.Errorf("decode %s: %w", path, err)
	}
	return m, nil
}

func (n *Node) remember(t target, top, manifest digest.Digest) error {
	data, err := json.Marshal(meaning{Reference: t.reference, Platform: t.platform, Top: top, Manifest: manifest})
	if err == nil {
		err = n.files.write(n.refPath(t), data)
	}
	if err != nil {
		return fmt.Errorf("remember what %s means: %w", t.reference, err)
	}
	return nil
}

// forgetRefs removes what leads to images that are not known.
func (n *Node) forgetRefs() error {
	entries, err := os.ReadDir(n.files.refs())
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(n.files.refs(), e.Name())
		m, err := readMeaning(path)
		if err == nil {
			if _, ok := n.known(m.Manifest); ok {
				continue
			}
		}
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return nil
}
