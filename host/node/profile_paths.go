package node

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/profile"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/pathlist"
)

// LeaseNamed takes a lease on an image that Named finds.
func (n *Node) LeaseNamed(ctx context.Context, name string) (*Lease, error) {
	d, err := digest.Parse(name)
	if err != nil {
		return n.Lease(ctx, name, "")
	}
	ref := n.references()[d]
	if ref == "" {
		return nil, fmt.Errorf("image %s is not on the node: prepare it first: %w", d, errdefs.ErrNotFound)
	}
	return n.LeaseManifest(ctx, ref, d)
}

// ExportProfile lists the files that a profile is about, in the order in which they
// are read, as pathlist.Write does. ErrNotFound when there is no such profile.
func (l *Lease) ExportProfile(key string) ([]byte, error) {
	var p *profile.Profile
	if slices.Contains(l.n.profileKeys(l.Manifest()), key) { // it is part of a path
		p = l.n.loadProfile(l.Manifest(), key)
	}
	if p == nil {
		return nil, l.noProfile(key)
	}
	t, err := l.n.tree(l.record)
	if err != nil {
		return nil, err
	}
	return pathlist.Write(t.Paths(p.Replay())), nil
}

func (l *Lease) noProfile(key string) error {
	return fmt.Errorf("image %s has no start-up profile (entrypoint %.64q): start a container of it, or import a list: %w",
		l.Manifest(), key, errdefs.ErrNotFound)
}

// Import says what became of a list of paths.
type Import struct {
	Known, Unknown int   // paths
	Bytes          int64 // of the profile
}

// ImportProfile makes a list of paths, as pathlist.Read gives it, the profile of
// the image, in the place of what there was, and fetches what it lists. It counts as
// one start: what the starts to come do not read falls out. ErrInvalidArgument when
// the image has none of the paths.
func (l *Lease) ImportProfile(paths []string) (Import, error) {
	found, unknown, err := l.n.find(l.record, l.Segments(), paths)
	if err != nil {
		return Import{}, err
	}
	if len(found) == 0 {
		return Import{}, fmt.Errorf("none of %d paths is a file with content in image %s: %w", len(paths), l.Manifest(), errdefs.ErrInvalidArgument)
	}
	p, err := l.n.changeProfile(l.Manifest(), "", func(p *profile.Profile) {
		*p = profile.Profile{Source: profile.Imported}
		p.Add(found, profile.MaxBytes(l.Size()), false)
	})
	if err != nil {
		return Import{}, err
	}
	l.Replay(nil)
	return Import{Known: len(paths) - unknown, Unknown: unknown, Bytes: profile.Bytes(p.Replay())}, nil
}

// find returns the chunks of files, in the order of the paths, and how many of these
// the image does not have.
func (n *Node) find(r *record, segments []index.Segment, paths []string) (found []profile.Range, unknown int, err error) {
	t, err := n.tree(r)
	if err != nil {
		return nil, 0, err
	}
	files, unknown := t.Find(paths)
	return chunks(segments, placed(segments, files), profile.MaxBytes(r.ImageSize)), unknown, nil
}

// tree reads the entries of an image's layers. They are in memory as long as it is.
func (n *Node) tree(r *record) (*profile.Tree, error) {
	var layers []profile.Layer
	for _, k := range r.Layers {
		l, err := n.readLayer(k.key())
		if err != nil {
			return nil, fmt.Errorf("find files of image %s: %w", r.Manifest.Digest, err)
		}
		layers = append(layers, profile.Layer{Segment: l.Table.ID(), Entries: l.Entries})
	}
	return profile.NewTree(layers), nil
}
