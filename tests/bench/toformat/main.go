// Command toformat copies the image of an OCI layout directory with its gzip
// layers in another format, made by that format's own library or program:
//
//	toformat FORMAT FROM TO
//
// It is for tests and measurements; both layouts have the tag "latest".
// "estargz-external" makes a second layout, TO-toc, with the image that holds
// the tables of contents. The Nydus formats need nydus-image, in PATH or named
// by TATAMI_NYDUS_IMAGE.
package main

import (
	"compress/gzip"
	"fmt"
	"io"
	"log"
	"maps"
	"os"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/ocilayout"
)

// formats are what the program makes; each function puts the layers of an
// image into the layout and returns the image with them.
var formats = map[string]func(from, to ocilayout.Dir, img ocilayout.Image) (ocilayout.Image, error){
	"tar":                eachLayer(uncompressed),
	"zstd-frames":        eachLayer(zstdFrames),
	"estargz":            eachLayer(plainEStargz),
	"estargz-inner":      eachLayer(innerEStargz),
	"estargz-external":   externalEStargz,
	"zstdchunked-stargz": eachLayer(stargzZstdChunked),
	"nydus5":             nydus{version: "5"}.image,
	"nydus6":             nydus{version: "6"}.image,
	"nydus6-lz4":         nydus{version: "6", args: []string{"--compressor", "lz4_block", "--digester", "sha256"}}.image,
	"nydus6-none":        nydus{version: "6", args: []string{"--compressor", "none"}}.image,
	"nydus-ref":          nydus{version: "6", ref: true}.image,
}

func main() {
	log.SetFlags(0)
	if len(os.Args) != 4 || formats[os.Args[1]] == nil {
		log.Fatalf("usage: toformat FORMAT FROM TO\nformats: %s", strings.Join(slices.Sorted(maps.Keys(formats)), " "))
	}
	if err := convert(os.Args[1], os.Args[2], os.Args[3]); err != nil {
		log.Fatal("toformat: ", err)
	}
}

func convert(format, from, to string) error {
	img, err := ocilayout.Dir(from).Image()
	if err != nil {
		return err
	}
	out, err := ocilayout.Create(to)
	if err != nil {
		return err
	}
	if img, err = formats[format](ocilayout.Dir(from), out, img); err != nil {
		return err
	}
	return out.Finish(img)
}

// source is a gzip layer of the image that is converted.
type source struct {
	desc   ocispec.Descriptor
	diffID digest.Digest
	file   *os.File
}

// eachLayer converts the layers one by one.
func eachLayer(layer func(ocilayout.Dir, source) (ocispec.Descriptor, digest.Digest, error)) func(from, to ocilayout.Dir, img ocilayout.Image) (ocilayout.Image, error) {
	return func(from, to ocilayout.Dir, img ocilayout.Image) (ocilayout.Image, error) {
		for i, l := range img.Manifest.Layers {
			f, err := os.Open(from.Path(l.Digest))
			if err != nil {
				return img, err
			}
			desc, diffID, err := layer(to, source{l, img.Config.RootFS.DiffIDs[i], f})
			f.Close()
			if err != nil {
				return img, fmt.Errorf("layer %s: %w", l.Digest, err)
			}
			img.Manifest.Layers[i], img.Config.RootFS.DiffIDs[i] = desc, diffID
		}
		return img, nil
	}
}

// writeTar writes the plain bytes of the layer.
func (s source) writeTar(w io.Writer) error {
	r, err := gzip.NewReader(s.file)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, r)
	return err
}

func uncompressed(to ocilayout.Dir, s source) (ocispec.Descriptor, digest.Digest, error) {
	desc, err := to.PutFrom(ocispec.MediaTypeImageLayer, s.writeTar)
	return desc, s.diffID, err
}
