package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tools/imageindex"
	"github.com/tatami-containers/tatami/tools/progress"
	"github.com/tatami-containers/tatami/tools/transport"
)

// indexed is what `tatami index` reports of one image. Sizes are in bytes.
type indexed struct {
	Platform string        `json:"platform"`
	Manifest digest.Digest `json:"manifest"`
	Artifact digest.Digest `json:"artifact,omitempty"`
	Image    int64         `json:"image"` // compressed layers, each once
	Index    int64         `json:"index"` // layer files
	Seconds  float64       `json:"seconds"`
	Error    string        `json:"error,omitempty"` // why it cannot be indexed; it has no artifact then
}

func indexCommand(ctx context.Context, args []string, s Streams) (int, error) {
	var o imageFlags
	var bind bool
	var profile string
	fs := flagSet("index", "[flags] IMAGE [DST]", s.Err)
	o.register(fs, s)
	fs.BoolVar(&bind, "bind", false, "list the index in the image index, under the tag of DST, and not only beside the image")
	fs.StringVar(&profile, "profile", "", "`FILE` with paths that a start reads, one a line: nodes prefetch them")
	if err := o.parse(fs, args, 1, 2); err != nil {
		return 0, err
	}
	defer o.close()
	src, dst := fs.Arg(0), fs.Arg(0)
	p, done := o.reporter()
	defer done()
	if fs.NArg() == 2 {
		dst = fs.Arg(1)
		if err := o.copy(ctx, src, dst, p); err != nil {
			return 0, err
		}
	}
	out, err := o.index(ctx, dst, bind, profile, p)
	if err != nil {
		return 0, err
	}
	done()
	return 0, o.print(out, func(w io.Writer) { printIndexed(w, out) })
}

// copy copies an image with all its platforms, or the one that was asked for.
func (o *imageFlags) copy(ctx context.Context, from, to string, p progress.Reporter) error {
	platform, err := o.wanted()
	if err != nil {
		return err
	}
	src, err := o.source(from)
	if err != nil {
		return err
	}
	dst, err := o.dest(to)
	if err != nil {
		return closing(src, err)
	}
	_, err = transport.Copy(ctx, src, dst, transport.CopyOptions{Platform: platform, Progress: p})
	return closing(src, closing(dst, err))
}

// index makes and publishes the indexes of an image where it is.
func (o *imageFlags) index(ctx context.Context, name string, bind bool, profile string, p progress.Reporter) ([]indexed, error) {
	opts := imageindex.Options{Progress: p}
	var err error
	if profile != "" {
		if opts.Profile, err = imageindex.ReadProfile(profile); err != nil {
			return nil, err
		}
	}
	src, sel, err := o.selected(ctx, name)
	if err != nil {
		return nil, err
	}
	dst, err := o.dest(name)
	if err != nil {
		return nil, closing(src, err)
	}
	out, err := publish(ctx, src, dst, sel, bind, opts)
	return out, closing(src, closing(dst, err))
}

func publish(ctx context.Context, src transport.Source, dst transport.Dest, sel *transport.Selection, bind bool, opts imageindex.Options) ([]indexed, error) {
	if bind && !hasTag(dst) {
		return nil, fmt.Errorf("--bind makes a new image index: name a tag for it: %w", errdefs.ErrInvalidArgument)
	}
	out, bound, err := publishEach(ctx, src, dst, sel.Images, opts)
	if err != nil || !bind {
		return out, err
	}
	data, err := imageindex.Bind(sel.Index, bound)
	if err != nil {
		return nil, err
	}
	_, err = dst.PushManifest(ctx, ocispec.MediaTypeImageIndex, data, dst.Tag())
	return out, err
}

// publishEach passes over images that cannot be indexed, with the reason in what
// it reports of them; it is an error when there are no others.
func publishEach(ctx context.Context, src transport.Source, dst transport.Dest, images []*image.Image, opts imageindex.Options) ([]indexed, []imageindex.Bound, error) {
	var out []indexed
	var bound []imageindex.Bound
	var reasons []error
	for _, img := range images {
		start := time.Now()
		files, err := imageindex.Build(ctx, src, img, opts)
		if unfit(err) {
			reasons = append(reasons, err)
			r := summary(img, ocispec.Descriptor{}, nil, time.Since(start))
			r.Error = err.Error()
			out = append(out, r)
			continue
		}
		if err != nil {
			return nil, nil, err
		}
		desc, err := imageindex.Publish(ctx, dst, img, files)
		if err != nil {
			return nil, nil, err
		}
		bound = append(bound, imageindex.Bound{Image: img, Artifact: desc})
		out = append(out, summary(img, desc, files, time.Since(start)))
	}
	if len(bound) == 0 {
		return nil, nil, errors.Join(reasons...)
	}
	return out, bound, nil
}

// unfit tells an image that Build refuses for what it is from a source that
// fails: a registry's errors may be of the same classes.
func unfit(err error) bool {
	var failed *registry.Error
	return (errdefs.IsFailedPrecondition(err) || errdefs.IsInvalidArgument(err)) && !errors.As(err, &failed)
}

func summary(img *image.Image, artifact ocispec.Descriptor, files []imageindex.File, took time.Duration) indexed {
	r := indexed{
		Platform: image.FormatPlatform(transport.PlatformOf(img)), Manifest: img.Desc.Digest, Artifact: artifact.Digest,
		Seconds: took.Seconds(),
	}
	seen := map[digest.Digest]bool{}
	for _, l := range img.Layers {
		if !seen[l.Digest] {
			r.Image += l.Size
		}
		seen[l.Digest] = true
	}
	for _, f := range files {
		r.Index += f.Desc.Size
	}
	return r
}

func printIndexed(w io.Writer, all []indexed) {
	for _, r := range all {
		if r.Error != "" {
			fmt.Fprintf(w, "%s %s\n  not indexed: %s\n", r.Platform, r.Manifest, r.Error)
			continue
		}
		fmt.Fprintf(w, "%s %s\n  index %s\n  %s for %s compressed (%.2f %%), %.1f s\n", r.Platform, r.Manifest, r.Artifact,
			progress.Bytes(r.Index), progress.Bytes(r.Image), 100*float64(r.Index)/float64(max(r.Image, 1)), r.Seconds)
	}
}
