package transport

import (
	"archive/tar"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/image"
)

var _ Dest = (*archiveDest)(nil)

// archiveDest writes a tar file of an OCI layout. It gathers the layout in a
// directory beside the file, and packs it in Close when an image was pushed;
// the same content makes the same bytes. For docker load there is the list of
// docker save as well, as docker itself writes it since version 25.
type archiveDest struct {
	*layoutDest
	name   Name
	object string // the image's reference or tag

	mu    sync.Mutex
	image *dockerImage // what Close lists for docker; protected by mu
	ready bool         // an image was pushed; protected by mu
}

func newArchiveDest(n Name) (*archiveDest, error) {
	d := &archiveDest{name: n, object: n.Object}
	if n.Kind == DockerArchive {
		var err error
		if d.object, err = dockerObject(n.Object); err != nil {
			return nil, err
		}
	}
	dir, err := os.MkdirTemp(filepath.Dir(n.Path), "."+filepath.Base(n.Path)+"-")
	if err != nil {
		return nil, err
	}
	if d.layoutDest, err = newLayoutDest(Name{Kind: Layout, Path: dir}); err != nil {
		return nil, errors.Join(err, os.RemoveAll(dir))
	}
	return d, nil
}

// Tag implements Dest.
func (d *archiveDest) Tag() string { return cmp.Or(d.object, defaultTag) }

// PushManifest implements Dest. An archive for docker has one image.
func (d *archiveDest) PushManifest(ctx context.Context, mediaType string, data []byte, tag string) (ocispec.Descriptor, error) {
	if tag == "" {
		return d.layoutDest.PushManifest(ctx, mediaType, data, "")
	}
	if d.name.Kind == DockerArchive {
		img, err := d.dockerImage(mediaType, data, tag)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		d.mu.Lock()
		defer d.mu.Unlock()
		if d.image != nil {
			return ocispec.Descriptor{}, fmt.Errorf("%s has an image already and can have only one: %w", d.name, errdefs.ErrInvalidArgument)
		}
		desc, err := d.layoutDest.PushManifest(ctx, mediaType, data, tag)
		if err == nil {
			d.image, d.ready = img, true
		}
		return desc, err
	}
	desc, err := d.layoutDest.PushManifest(ctx, mediaType, data, tag)
	d.mu.Lock()
	defer d.mu.Unlock()
	d.ready = d.ready || err == nil
	return desc, err
}

// dockerImage is what docker load wants to know of a manifest.
func (d *archiveDest) dockerImage(mediaType string, data []byte, tag string) (*dockerImage, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(data, &m); err != nil {
		return nil, fmt.Errorf("decode the manifest: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if m.Config.Digest == "" {
		return nil, fmt.Errorf("docker load takes single images only, and this is of media type %.100q: choose a platform, or write to %s: or %s: %w", mediaType, Layout, OCIArchive, errdefs.ErrInvalidArgument)
	}
	img := &dockerImage{Config: blobPath(m.Config.Digest), RepoTags: []string{}}
	if ref, err := image.ParseReference(tag); err == nil && d.object != "" {
		img.RepoTags = append(img.RepoTags, reference.FamiliarString(ref))
	}
	for _, l := range m.Layers {
		img.Layers = append(img.Layers, blobPath(l.Digest))
	}
	return img, nil
}

// Close implements Dest.
func (d *archiveDest) Close() error {
	defer os.RemoveAll(d.dir)
	if err := d.layoutDest.Close(); err != nil || !d.ready {
		return err
	}
	if err := d.pack(); err != nil {
		return fmt.Errorf("write %s: %w", d.name, err)
	}
	return nil
}

// pack writes the archive and gives it its name.
func (d *archiveDest) pack() error {
	if d.image != nil {
		if err := writeJSON(d.dir, dockerList, []dockerImage{*d.image}); err != nil {
			return err
		}
	}
	f, err := newPart(filepath.Dir(d.name.Path))
	if err != nil {
		return err
	}
	defer f.drop()
	tw := tar.NewWriter(f)
	root := os.DirFS(d.dir)
	err = fs.WalkDir(root, ".", func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() || strings.HasPrefix(e.Name(), ".") {
			return err
		}
		return packFile(tw, root, name)
	})
	if err = errors.Join(err, tw.Close()); err != nil {
		return err
	}
	return f.keep(d.name.Path)
}

// packFile writes a file of a layout with attributes that are always the same.
func packFile(tw *tar.Writer, root fs.FS, name string) error {
	f, err := root.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	// Without a format, large sizes would need more than one header.
	hdr := &tar.Header{Typeflag: tar.TypeReg, Name: name, Mode: 0o644, Size: st.Size(), Format: tar.FormatGNU}
	if err := tw.WriteHeader(hdr); err != nil {
		return err
	}
	_, err = io.Copy(tw, f)
	return err
}
