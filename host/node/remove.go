package node

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/formats"
)

// Remove forgets an image, and the layer indexes and segments that nothing
// else uses. ErrNotFound when the node does not have it, ErrFailedPrecondition
// while it is leased.
func (n *Node) Remove(manifest digest.Digest) error {
	r, err := n.forget(manifest)
	if err != nil {
		return fmt.Errorf("remove image %s: %w", manifest, err)
	}
	n.stopReplays(manifest) // none begins any more
	var used []layerKey
	for _, l := range r.Layers {
		used = append(used, l.key())
	}
	n.sweep(used)
	err = n.store.Remove(manifest)
	if errdefs.IsNotFound(err) {
		err = nil // lost in a crash
	}
	if err := errors.Join(err, n.forgetRefs()); err != nil {
		return fmt.Errorf("remove image %s: %w", manifest, err)
	}
	n.repin()
	n.log.Info("image removed", "manifest", manifest)
	return nil
}

// forget makes an image unknown, here and on disk.
func (n *Node) forget(manifest digest.Digest) (*record, error) {
	n.profiling.Lock()
	defer n.profiling.Unlock()
	n.mu.Lock()
	defer n.mu.Unlock()
	r, ok := n.images[manifest]
	if !ok {
		return nil, fmt.Errorf("it is not on the node: %w", errdefs.ErrNotFound)
	}
	if n.leases[manifest] > 0 {
		return nil, fmt.Errorf("a sandbox uses it; detach that first: %w", errdefs.ErrFailedPrecondition)
	}
	// A rename, so that a crash leaves all of it or nothing.
	gone := filepath.Join(n.files.temp(), "removed-"+manifest.Encoded())
	if err := os.Rename(n.files.image(manifest), gone); err != nil {
		return nil, err
	}
	delete(n.images, manifest)
	return r, os.RemoveAll(gone)
}

// allKeys are the layer indexes that an image may use.
func allKeys(f *formats.Finder, layers []formats.Layer) []layerKey {
	var out []layerKey
	for _, l := range layers {
		out = append(out, layerKey{blob: l.Digest})
		for _, w := range f.Ways(l) {
			out = append(out, layerKey{l.Digest, w.By})
		}
	}
	return out
}

// pin keeps the indexes of layers from being removed until the result is
// called.
func (n *Node) pin(layers []formats.Layer) (unpin func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, l := range layers {
		n.pins[l.Digest]++
	}
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		for _, l := range layers {
			if n.pins[l.Digest]--; n.pins[l.Digest] == 0 {
				delete(n.pins, l.Digest)
			}
		}
	}
}

// sweep removes those of the layer indexes that no image uses and no prepare
// counts on.
func (n *Node) sweep(candidates []layerKey) {
	n.mu.Lock()
	defer n.mu.Unlock()
	used := n.usedLayers()
	for _, k := range candidates {
		if used[k] || n.pins[k.blob] > 0 {
			continue
		}
		if err := os.Remove(n.layerPath(k)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			n.log.Warn("a layer index that is not used cannot be removed", "layer", k.blob, "error", err)
		}
		n.access.forget(k)
	}
}

// Precondition: n.mu is held.
func (n *Node) usedLayers() map[layerKey]bool {
	used := map[layerKey]bool{}
	for _, r := range n.images {
		for _, l := range r.Layers {
			used[l.key()] = true
		}
	}
	return used
}

// restore loads the records of the images and removes what belongs to none.
// An image whose record is damaged is removed: preparing it makes it anew.
func (n *Node) restore() error {
	var damaged []string
	err := digests(n.files.images(), func(d digest.Digest, rest, path string) {
		err := fmt.Errorf("this is not the name of an image: %w", errdefs.ErrDataLoss)
		var r *record
		if d != "" && rest == "" {
			r, err = n.loadRecord(d)
		}
		if err != nil {
			n.log.Warn("an image on disk is damaged and is removed; prepare it again", "path", path, "error", err)
			damaged = append(damaged, path)
			return
		}
		n.images[d] = r
	})
	if err != nil {
		return err
	}
	for _, path := range damaged {
		if err := os.RemoveAll(path); err != nil {
			return err
		}
	}
	return errors.Join(n.restoreLayers(), n.restoreStore(), n.forgetRefs())
}

// restoreLayers removes layer indexes that belong to no image.
func (n *Node) restoreLayers() error {
	used := map[string]bool{}
	for k := range n.usedLayers() {
		used[n.layerPath(k)] = true
	}
	var unused []string
	err := digests(n.files.layers(), func(_ digest.Digest, _, path string) {
		if !used[path] {
			unused = append(unused, path)
		}
	})
	for _, path := range unused {
		err = errors.Join(err, os.Remove(path))
	}
	return err
}

// restoreStore removes what the store has of images that are not known.
func (n *Node) restoreStore() error {
	for _, i := range n.store.Images() {
		if _, ok := n.images[i.Manifest]; !ok {
			if err := n.store.Remove(i.Manifest); err != nil {
				return err
			}
		}
	}
	_, err := n.store.GC()
	return err
}
