package main

import (
	"io"
	"slices"
	"strings"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/externaltoc"
	"github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/ocilayout"
)

// minChunk is ctr-remote's example for --estargz-min-chunk-size, in bytes.
const minChunk = 50_000

// layerDigestAnnotation tells in the image of tables which layer one belongs to
// (stargz-snapshotter, nativeconverter/estargz/externaltoc).
const layerDigestAnnotation = "containerd.io/snapshot/stargz/layer.digest"

func plainEStargz(to ocilayout.Dir, s source) (ocispec.Descriptor, digest.Digest, error) {
	return buildEStargz(to, s, ocispec.MediaTypeImageLayerGzip)
}

// innerEStargz puts many small files into one gzip member, and the files whose
// names it likes before a landmark.
func innerEStargz(to ocilayout.Dir, s source) (ocispec.Descriptor, digest.Digest, error) {
	var missed []string
	return buildEStargz(to, s, ocispec.MediaTypeImageLayerGzip, estargz.WithMinChunkSize(minChunk),
		estargz.WithPrioritizedFiles([]string{"etc/passwd", "data/random-65537", "bin/sh"}), estargz.WithAllowPrioritizeNotFound(&missed))
}

func stargzZstdChunked(to ocilayout.Dir, s source) (ocispec.Descriptor, digest.Digest, error) {
	metadata := map[string]string{}
	desc, diffID, err := buildEStargz(to, s, ocispec.MediaTypeImageLayerZstd, estargz.WithCompression(&zstdCompression{
		Compressor:   &zstdchunked.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: metadata},
		Decompressor: &zstdchunked.Decompressor{},
	}))
	for k, v := range metadata {
		desc.Annotations[k] = v
	}
	return desc, diffID, err
}

type zstdCompression struct {
	*zstdchunked.Compressor
	*zstdchunked.Decompressor
}

// externalEStargz leaves the tables out of the layers and makes an image of
// them, which belongs to the tag of the image with "-esgztoc" behind it.
func externalEStargz(from, to ocilayout.Dir, img ocilayout.Image) (ocilayout.Image, error) {
	toc, err := ocilayout.Create(string(to) + "-toc")
	if err != nil {
		return img, err
	}
	var tables ocilayout.Image
	img, err = eachLayer(func(to ocilayout.Dir, s source) (ocispec.Descriptor, digest.Digest, error) {
		c := externaltoc.NewGzipCompressionWithLevel(nil, 9).(*externaltoc.GzipCompression)
		desc, diffID, err := buildEStargz(to, s, ocispec.MediaTypeImageLayerGzip, estargz.WithCompression(c))
		if err != nil {
			return desc, diffID, err
		}
		table, err := toc.PutFrom(ocispec.MediaTypeImageLayerGzip, func(w io.Writer) error {
			_, err := c.WriteTOCTo(w)
			return err
		})
		table.Annotations = map[string]string{layerDigestAnnotation: desc.Digest.String()}
		tables.Manifest.Layers = append(tables.Manifest.Layers, table)
		return desc, diffID, err
	})(from, to, img)
	if err != nil {
		return img, err
	}
	slices.SortFunc(tables.Manifest.Layers, func(a, b ocispec.Descriptor) int {
		return strings.Compare(a.Digest.String(), b.Digest.String())
	})
	return img, toc.Finish(tables)
}

// buildEStargz has the library make a layer of the source.
func buildEStargz(to ocilayout.Dir, s source, mediaType string, opts ...estargz.Option) (ocispec.Descriptor, digest.Digest, error) {
	blob, err := estargz.Build(io.NewSectionReader(s.file, 0, s.desc.Size), opts...)
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	desc, err := to.PutFrom(mediaType, func(w io.Writer) error {
		_, err := io.Copy(w, blob)
		return err
	})
	if err2 := blob.Close(); err == nil { // DiffID is known only then
		err = err2
	}
	desc.Annotations = map[string]string{estargz.TOCJSONDigestAnnotation: blob.TOCDigest().String()}
	return desc, blob.DiffID(), err
}
