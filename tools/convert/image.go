package convert

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/unpack"
	"github.com/tatami-containers/tatami/tools/progress"
	"github.com/tatami-containers/tatami/tools/transport"
)

// Report says what converting an image came to. Sizes are in bytes.
type Report struct {
	Source   digest.Digest `json:"source"`
	Manifest digest.Digest `json:"manifest"`
	Before   int64         `json:"before"` // all blobs, compressed
	After    int64         `json:"after"`
	Plain    int64         `json:"plain"` // all tars
	Seconds  float64       `json:"seconds"`
}

// Image converts every layer of an image and writes the image to dst, without a
// tag or, if tag is not empty, under it. Layers of a Nydus image are refused:
// they are no tars. The manifest is OCI's whatever the source's was.
func Image(ctx context.Context, src transport.Source, dst transport.Dest, img *image.Image, opts Options, tag string, p progress.Reporter) (ocispec.Descriptor, *Report, error) {
	start := time.Now()
	c := &imageConverter{src: src, dst: dst, opts: opts, progress: p, done: map[digest.Digest]*Result{}}
	desc, err := c.convert(ctx, img, tag)
	if err != nil {
		return desc, nil, fmt.Errorf("convert image %s: %w", img.Reference, err)
	}
	c.report.Source, c.report.Manifest = img.Desc.Digest, desc.Digest
	c.report.Seconds = time.Since(start).Seconds()
	return desc, &c.report, nil
}

type imageConverter struct {
	src      transport.Source
	dst      transport.Dest
	opts     Options
	progress progress.Reporter
	done     map[digest.Digest]*Result // by the blob before
	report   Report
}

func (c *imageConverter) convert(ctx context.Context, img *image.Image, tag string) (ocispec.Descriptor, error) {
	for _, l := range img.Layers {
		if err := layer.CheckMediaType(l.MediaType); err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("layer %s: %w", l.Digest, err)
		}
	}
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Annotations: img.Manifest.Annotations,
	}
	var diffIDs []digest.Digest
	for _, l := range img.Layers {
		res, err := c.layer(ctx, l)
		if err != nil {
			return ocispec.Descriptor{}, fmt.Errorf("layer %s: %w", l.Digest, err)
		}
		m.Layers = append(m.Layers, res.Descriptor)
		diffIDs = append(diffIDs, res.DiffID)
	}
	var err error
	if m.Config, err = c.config(ctx, img.ConfigBytes, diffIDs); err != nil {
		return ocispec.Descriptor{}, err
	}
	data, err := json.Marshal(m)
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("encode manifest: %w", err)
	}
	return c.dst.PushManifest(ctx, m.MediaType, data, tag)
}

// config writes the image's config with other diffIDs; the rest of it stays,
// known or not.
func (c *imageConverter) config(ctx context.Context, data []byte, diffIDs []digest.Digest) (ocispec.Descriptor, error) {
	var doc map[string]json.RawMessage
	if err := json.Unmarshal(data, &doc); err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("decode config: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	rootfs, err := json.Marshal(ocispec.RootFS{Type: "layers", DiffIDs: diffIDs})
	if err == nil {
		doc["rootfs"] = rootfs
		data, err = json.Marshal(doc)
	}
	if err != nil {
		return ocispec.Descriptor{}, fmt.Errorf("encode config: %w", err)
	}
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(data), Size: int64(len(data))}
	return desc, c.dst.PushBlob(ctx, desc, bytes.NewReader(data))
}

// layer converts one layer, unless it came before.
func (c *imageConverter) layer(ctx context.Context, l image.Layer) (*Result, error) {
	if res := c.done[l.Digest]; res != nil {
		return res, nil
	}
	job := c.progress.Start("convert "+l.Digest.Encoded()[:12], l.Size)
	res, err := c.convertLayer(ctx, l, job)
	if err != nil {
		job.Done("failed")
		return nil, err
	}
	job.Done(progress.Bytes(res.Descriptor.Size))
	c.done[l.Digest] = res
	c.report.Before += l.Size
	c.report.After += res.Descriptor.Size
	c.report.Plain += res.PlainSize
	return res, nil
}

func (c *imageConverter) convertLayer(ctx context.Context, l image.Layer, job progress.Job) (*Result, error) {
	body, err := c.src.Open(ctx, l.Descriptor)
	if err != nil {
		return nil, err
	}
	defer body.Close()
	plain, err := unpack.Decompress(&told{body, job})
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	tar := &hashed{r: plain, digester: l.DiffID.Algorithm().Digester()}
	res, err := c.write(ctx, tar)
	if err != nil {
		return nil, err
	}
	// The blob was checked when it ended; so is what came out of it.
	if _, err := io.Copy(io.Discard, tar); err != nil {
		return nil, err
	}
	if _, err := io.Copy(io.Discard, body); err != nil {
		return nil, err
	}
	return res, l.CheckDiffID(tar.digester.Digest())
}

// write converts a tar and sends the blob to the destination while it is made.
func (c *imageConverter) write(ctx context.Context, tar io.Reader) (*Result, error) {
	if len(c.opts.Profile) > 0 {
		file, err := spool(tar)
		if err != nil {
			return nil, err
		}
		defer file.Close()
		tar = file
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	r, w := io.Pipe()
	var res *Result
	failed := make(chan error, 1)
	go func() { // ends with r
		made, err := Layer(ctx, tar, w, c.opts)
		res = made
		w.CloseWithError(err)
		failed <- err
	}()
	sent, pushErr := c.dst.PushStream(ctx, c.opts.Format.mediaType(), r)
	r.CloseWithError(errors.Join(errors.New("the destination has failed"), pushErr))
	if err := <-failed; err != nil && pushErr == nil {
		return nil, err
	}
	if pushErr != nil {
		return nil, pushErr
	}
	if sent.Digest != res.Descriptor.Digest {
		return nil, fmt.Errorf("the destination has blob %s, not %s: %w", sent.Digest, res.Descriptor.Digest, errdefs.ErrDataLoss)
	}
	return res, nil
}

// mediaType is that of layers in the format.
func (f Format) mediaType() string {
	if f == EStargz {
		return ocispec.MediaTypeImageLayerGzip
	}
	return ocispec.MediaTypeImageLayerZstd
}

// spool puts a tar into a temporary file, which is gone when it is closed.
func spool(tar io.Reader) (*os.File, error) {
	file, err := os.CreateTemp("", "tatami-convert-")
	if err != nil {
		return nil, fmt.Errorf("spool a layer: %w", err)
	}
	err = os.Remove(file.Name())
	if err == nil {
		_, err = io.Copy(file, tar)
	}
	if err == nil {
		_, err = file.Seek(0, io.SeekStart)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("spool a layer (set TMPDIR to a directory with room): %w", err), file.Close())
	}
	return file, nil
}

// told tells a job what is read.
type told struct {
	io.Reader
	job progress.Job
}

func (t *told) Read(p []byte) (int, error) {
	n, err := t.Reader.Read(p)
	t.job.Add(int64(n))
	return n, err
}

// hashed is a reader with the digest of what was read.
type hashed struct {
	r        io.Reader
	digester digest.Digester
}

func (h *hashed) Read(p []byte) (int, error) {
	n, err := h.r.Read(p)
	h.digester.Hash().Write(p[:n])
	return n, err
}
