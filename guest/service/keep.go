package service

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// configs keeps the configurations of mounted images for a Mount that is
// repeated, also by the next process. Changes are made under Guest.mu.
type configs struct{ dir string }

func (c configs) path(m digest.Digest) string { return filepath.Join(c.dir, m.Encoded()+".json") }

func (c configs) put(m digest.Digest, config []byte) error {
	if err := os.MkdirAll(c.dir, 0o700); err != nil {
		return err
	}
	tmp := c.path(m) + ".tmp"
	if err := os.WriteFile(tmp, config, 0o600); err != nil {
		return err
	}
	return os.Rename(tmp, c.path(m))
}

func (c configs) get(m digest.Digest) ([]byte, error) {
	b, err := os.ReadFile(c.path(m))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("configuration of %s is lost: unmount and mount again: %w", m, errdefs.ErrDataLoss)
	}
	return b, err
}

// keepOnly removes all configurations but those of the given manifests.
func (c configs) keepOnly(used map[digest.Digest]bool) error {
	files, err := os.ReadDir(c.dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	names := make(map[string]bool)
	for m := range used {
		names[filepath.Base(c.path(m))] = true
	}
	var errs []error
	for _, f := range files {
		if !names[f.Name()] {
			errs = append(errs, os.Remove(filepath.Join(c.dir, f.Name())))
		}
	}
	return errors.Join(append(errs, err)...)
}
