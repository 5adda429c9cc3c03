package transport

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/tools/progress"
)

// CopyOptions say what is copied and how. The zero value is all that the name
// of the source means, an index with all its platforms, without referrers.
type CopyOptions struct {
	Platform  *ocispec.Platform // only the image for this one, without the index above it
	Referrers bool              // also what refers to anything that is copied
	Parallel  int               // blobs at a time; 0 is 4
	Progress  progress.Reporter // nil is none
}

const defaultParallel = 4

// Copy copies an image, or an index with all below it, and returns its
// descriptor. Manifests are copied byte for byte; blobs that the destination
// has, or can take over from the source's repository, are not sent.
func Copy(ctx context.Context, src Source, dst Dest, opts CopyOptions) (ocispec.Descriptor, error) {
	c := &copier{src: src, dst: dst, progress: opts.Progress}
	if c.progress == nil {
		c.progress = progress.None
	}
	p := newPlan(src)
	top, err := p.addTop(ctx, opts.Platform)
	if err == nil && opts.Referrers {
		err = p.addReferrers(ctx)
	}
	if err != nil {
		return top, fmt.Errorf("find out what to copy: %w", err)
	}
	if err := c.copyBlobs(ctx, p.blobs, cmp.Or(opts.Parallel, defaultParallel)); err != nil {
		return top, err
	}
	for _, m := range p.manifests {
		if err := c.copyManifest(ctx, m, m.desc.Digest == top.Digest); err != nil {
			return top, fmt.Errorf("copy manifest %s: %w", m.desc.Digest, err)
		}
	}
	return top, nil
}

// addTop plans what the source's name means.
func (p *plan) addTop(ctx context.Context, platform *ocispec.Platform) (ocispec.Descriptor, error) {
	if platform != nil {
		img, err := image.ResolveObject(ctx, p.src, "", "for one platform", *platform)
		if err != nil {
			return ocispec.Descriptor{}, err
		}
		return img.Desc, p.add(ctx, img.Desc, img.ManifestBytes, 0)
	}
	desc, data, err := p.src.GetManifest(ctx, "")
	if err != nil {
		return desc, err
	}
	return desc, p.add(ctx, desc, data, 0)
}

// copier is one Copy.
type copier struct {
	src      Source
	dst      Dest
	progress progress.Reporter
}

func (c *copier) copyBlobs(ctx context.Context, blobs []ocispec.Descriptor, parallel int) error {
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	for _, desc := range blobs {
		g.Go(func() error {
			if err := c.copyBlob(ctx, desc); err != nil {
				return fmt.Errorf("copy blob %s: %w", desc.Digest, err)
			}
			return nil
		})
	}
	return g.Wait()
}

func (c *copier) copyBlob(ctx context.Context, desc ocispec.Descriptor) error {
	job := c.progress.Start(shortName(desc), desc.Size)
	if has, err := c.dst.Has(ctx, desc); has || err != nil {
		job.Done(outcome(err, "is there already"))
		return err
	}
	// A mount that fails costs nothing but the time to send the blob.
	if mounted, err := c.dst.Mount(ctx, desc, c.src); err == nil && mounted {
		job.Done("taken over from the source's repository")
		return nil
	}
	r := &rewinder{ctx: ctx, src: c.src, desc: desc, job: job}
	err := errors.Join(c.dst.PushBlob(ctx, desc, r), r.close())
	job.Done(outcome(err, ""))
	return err
}

func outcome(err error, note string) string {
	if err != nil {
		return "failed"
	}
	return note
}

// shortName is a blob in 20 characters.
func shortName(desc ocispec.Descriptor) string {
	kind := "blob "
	if strings.Contains(desc.MediaType, ".layer.") || strings.Contains(desc.MediaType, ".rootfs.") {
		kind = "layer "
	}
	return kind + desc.Digest.Encoded()[:12]
}

// copyManifest leaves out what is there, unless it has to be listed.
func (c *copier) copyManifest(ctx context.Context, m manifest, top bool) error {
	tag := ""
	if top {
		tag = c.dst.Tag()
	} else if !m.refers {
		if has, err := c.dst.Has(ctx, m.desc); has || err != nil {
			return err
		}
	}
	_, err := c.dst.PushManifest(ctx, m.desc.MediaType, m.data, tag)
	return err
}

// rewinder reads a blob of a source, and again from the start after a Seek. It
// belongs to one goroutine at a time.
type rewinder struct {
	ctx  context.Context // of the copying
	src  Source
	desc ocispec.Descriptor
	job  progress.Job
	rc   io.ReadCloser // nil before the first Read
	n    int64         // bytes read
}

var _ io.ReadSeeker = (*rewinder)(nil)

func (r *rewinder) Read(p []byte) (int, error) {
	if r.rc == nil {
		rc, err := r.src.Open(r.ctx, r.desc)
		if err != nil {
			return 0, err
		}
		r.rc = rc
	}
	n, err := r.rc.Read(p)
	r.n += int64(n)
	r.job.Add(int64(n))
	return n, err
}

// Seek goes to the start or stays where it is.
func (r *rewinder) Seek(offset int64, whence int) (int64, error) {
	switch {
	case offset == 0 && whence == io.SeekCurrent:
		return r.n, nil
	case offset == 0 && whence == io.SeekStart:
		err := r.close()
		r.job.Add(-r.n)
		r.n = 0
		return 0, err
	}
	return 0, fmt.Errorf("seek of a blob to other than its start: %w", errors.ErrUnsupported)
}

func (r *rewinder) close() error {
	if r.rc == nil {
		return nil
	}
	err := r.rc.Close()
	r.rc = nil
	return err
}
