package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"io"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tools/convert"
	"github.com/tatami-containers/tatami/tools/imageindex"
	"github.com/tatami-containers/tatami/tools/progress"
	"github.com/tatami-containers/tatami/tools/transport"
)

func convertCommand(ctx context.Context, args []string, s Streams) (int, error) {
	var o imageFlags
	var to, profile string
	var opts convert.Options
	fs := flagSet("convert", "[flags] --to estargz|zstdchunked|tatami SRC DST", s.Err)
	o.register(fs, s)
	fs.StringVar(&to, "to", "", "estargz, zstdchunked (podman's), zstdchunked-stargz, or tatami: the image with a bound index,\nand its layers as they are, or with --profile as zstdchunked")
	fs.StringVar(&profile, "profile", "", "`FILE` with paths that a start reads, one a line: they come first")
	fs.IntVar(&opts.Level, "level", 0, "of compression: 1 to 9 for estargz, 1 to 19 for zstd (default 9, 3)")
	fs.Int64Var(&opts.ChunkSize, "chunk-size", 0, "largest chunk in `bytes` (default 4 MiB for estargz, 1 MiB for zstd)")
	fs.Int64Var(&opts.Pack, "pack", 0, "plain `bytes` of small files that are compressed together (estargz; default: none)")
	if err := o.parse(fs, args, 2, 2); err != nil {
		return 0, err
	}
	defer o.close()
	format, err := formatOf(to, profile != "")
	if err != nil {
		return 0, err
	}
	opts.Format = format
	if profile != "" {
		if opts.Profile, err = imageindex.ReadProfile(profile); err != nil {
			return 0, err
		}
	}
	p, done := o.reporter()
	defer done()
	var all []*convert.Report
	if format == 0 {
		err = o.copy(ctx, fs.Arg(0), fs.Arg(1), p)
	} else {
		all, err = o.convert(ctx, fs.Arg(0), fs.Arg(1), opts, p)
	}
	if err != nil {
		return 0, err
	}
	out := converted{Images: all}
	if to == "tatami" {
		if out.Indexes, err = o.index(ctx, fs.Arg(1), true, profile, p); err != nil {
			return 0, err
		}
	}
	done()
	return 0, o.print(out, func(w io.Writer) { out.print(w) })
}

// converted is what `tatami convert` reports.
type converted struct {
	Images  []*convert.Report `json:"images,omitempty"`
	Indexes []indexed         `json:"indexes,omitempty"`
}

func (c converted) print(w io.Writer) {
	for _, r := range c.Images {
		fmt.Fprintf(w, "%s\n  from %s\n  %s, was %s; %s of tar in %.1f s (%.0f MB/s)\n", r.Manifest, r.Source,
			progress.Bytes(r.After), progress.Bytes(r.Before), progress.Bytes(r.Plain), r.Seconds, float64(r.Plain)/1e6/max(r.Seconds, 1e-9))
	}
	printIndexed(w, c.Indexes)
}

// formatOf is the format of layers; 0 leaves them as they are.
func formatOf(to string, profile bool) (convert.Format, error) {
	switch to {
	case "estargz":
		return convert.EStargz, nil
	case "zstdchunked":
		return convert.ZstdChunked, nil
	case "zstdchunked-stargz":
		return convert.ZstdStargz, nil
	case "tatami":
		if profile {
			return convert.ZstdChunked, nil
		}
		return 0, nil
	}
	return 0, fmt.Errorf("--to %q: want estargz, zstdchunked, zstdchunked-stargz or tatami: %w", to, errdefs.ErrInvalidArgument)
}

// convert converts an image for all its platforms, or for the one asked for.
func (o *imageFlags) convert(ctx context.Context, from, to string, opts convert.Options, p progress.Reporter) ([]*convert.Report, error) {
	src, sel, err := o.selected(ctx, from)
	if err != nil {
		return nil, err
	}
	dst, err := o.dest(to)
	if err != nil {
		return nil, closing(src, err)
	}
	out, err := convertAll(ctx, src, dst, sel, opts, p)
	return out, closing(src, closing(dst, err))
}

func convertAll(ctx context.Context, src transport.Source, dst transport.Dest, sel *transport.Selection, opts convert.Options, p progress.Reporter) ([]*convert.Report, error) {
	if !hasTag(dst) {
		return nil, fmt.Errorf("a converted image has another digest: name a tag for it: %w", errdefs.ErrInvalidArgument)
	}
	list := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex}
	if sel.Index != nil {
		list.Annotations = sel.Index.Annotations
	}
	single := len(sel.Images) == 1
	var out []*convert.Report
	for _, img := range sel.Images {
		tag := ""
		if single {
			tag = dst.Tag()
		}
		desc, r, err := convert.Image(ctx, src, dst, img, opts, tag, p)
		if err != nil {
			return nil, err
		}
		platform := transport.PlatformOf(img)
		desc.Platform = &platform
		list.Manifests = append(list.Manifests, desc)
		out = append(out, r)
	}
	if single {
		return out, nil
	}
	data, err := json.Marshal(list)
	if err != nil {
		return nil, fmt.Errorf("encode image index: %w", err)
	}
	_, err = dst.PushManifest(ctx, list.MediaType, data, dst.Tag())
	return out, err
}
