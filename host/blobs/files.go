package blobs

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const partial = ".part"

// key is a blob of one registry.
type key struct {
	digest   digest.Digest
	registry string // what is left of its name: hexadecimal digits
}

func keyOf(from Origin, d digest.Digest) key {
	sum := sha256.Sum256([]byte(from.Host()))
	return key{d, hex.EncodeToString(sum[:16])}
}

func (c *Cache) name(k key) string {
	return filepath.Join(c.cfg.Dir, k.digest.Algorithm().String()+"-"+k.digest.Encoded()+"-"+k.registry)
}

// parseName is the reverse of name.
func parseName(base string) (k key, ok bool) {
	parts := strings.Split(base, "-")
	if len(parts) != 3 {
		return key{}, false
	}
	k = key{digest.NewDigestFromEncoded(digest.Algorithm(parts[0]), parts[1]), parts[2]}
	sum, err := hex.DecodeString(k.registry)
	return k, k.digest.Validate() == nil && err == nil && len(sum) == 16
}

// path is where the entry's bytes are. Precondition: mu is held.
func (c *Cache) path(e *entry) string {
	if e.complete {
		return c.name(e.key)
	}
	return c.name(e.key) + partial
}

// finish makes an entry complete whose bytes are all there and synced. One that was
// given up meanwhile stays so. Precondition: mu is held.
func (c *Cache) finish(e *entry) error {
	if c.entries[e.key] != e {
		return nil
	}
	if err := os.Rename(c.path(e), c.name(e.key)); err != nil {
		return errors.Join(errDisk, err)
	}
	e.complete, e.noted = true, time.Now()
	e.spot = c.order.PushFront(e)
	return nil // a crash before the directory is on the disk loses the blob, no more
}

// restore finds the complete blobs and removes everything else.
func (c *Cache) restore() error {
	list, err := os.ReadDir(c.cfg.Dir)
	if err != nil {
		return err
	}
	var found []*entry
	for _, f := range list {
		e, err := restored(f)
		if err == nil && e == nil {
			err = os.RemoveAll(filepath.Join(c.cfg.Dir, f.Name()))
		}
		if err != nil {
			return err
		}
		if e != nil {
			found = append(found, e)
		}
	}
	slices.SortFunc(found, func(a, b *entry) int { return b.noted.Compare(a.noted) })
	for _, e := range found {
		e.spot = c.order.PushBack(e)
		c.entries[e.key] = e
		c.used += e.counts()
	}
	c.shrink(c.cfg.Size) // the settings may have less room than before
	return nil
}

// restored returns the entry of a file, or nil when it is not a blob.
func restored(f os.DirEntry) (*entry, error) {
	k, ok := parseName(f.Name())
	if !ok || !f.Type().IsRegular() {
		return nil, nil
	}
	info, err := f.Info()
	if err != nil {
		return nil, err
	}
	return &entry{
		key: k, desc: ocispec.Descriptor{Digest: k.digest, Size: info.Size()}, complete: true, noted: info.ModTime(),
		filled: info.Size(), changed: make(chan struct{}),
	}, nil
}
