package main

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/ocilayout"
)

// What a Nydus image is in a registry (nydus-snapshotter, pkg/converter).
const (
	nydusBlob                = "application/vnd.oci.image.layer.nydus.blob.v1"
	nydusBlobAnnotation      = "containerd.io/snapshot/nydus-blob"
	nydusBootstrapAnnotation = "containerd.io/snapshot/nydus-bootstrap"
	nydusVersionAnnotation   = "containerd.io/snapshot/nydus-fs-version"
	nydusRefAnnotation       = "containerd.io/snapshot/nydus-ref"
)

// nydus packs an image as `nydusify convert` does: nydus-image makes a blob
// with its own bootstrap of every layer and merges the bootstraps; a last layer,
// a tar, carries the result.
type nydus struct {
	version string   // of the file system: "5" or "6"
	args    []string // more arguments for `nydus-image create`
	ref     bool     // leave the data in the gzip layers (OCI-ref, zran)
}

// nydusLayer is what merging needs to know of a layer.
type nydusLayer struct {
	desc      ocispec.Descriptor
	bootstrap string        // path of the layer's own
	toc       digest.Digest // of the blob's table of contents; OCI-ref only
	meta      []byte        // chunk information, as the last layer carries it; version 6 only
}

func (n nydus) image(from, to ocilayout.Dir, img ocilayout.Image) (ocilayout.Image, error) {
	work, err := os.MkdirTemp(string(to), "nydus-")
	if err != nil {
		return img, err
	}
	defer os.RemoveAll(work)
	var layers []nydusLayer
	for i, l := range img.Manifest.Layers {
		nl, err := n.layer(from, to, l, filepath.Join(work, strconv.Itoa(i)))
		if err != nil {
			return img, fmt.Errorf("layer %s: %w", l.Digest, err)
		}
		layers = append(layers, nl)
	}
	boot, blobs, err := n.merge(layers, work)
	if err != nil {
		return img, err
	}
	img.Manifest.Layers, img.Config.RootFS.DiffIDs = nil, nil
	for _, l := range layers {
		img.Manifest.Layers = append(img.Manifest.Layers, l.desc)
		img.Config.RootFS.DiffIDs = append(img.Config.RootFS.DiffIDs, l.desc.Digest)
	}
	if err := n.covered(blobs, img.Manifest.Layers); err != nil {
		return img, err
	}
	desc, diffID, err := n.lastLayer(to, boot, layers)
	img.Manifest.Layers = append(img.Manifest.Layers, desc)
	img.Config.RootFS.DiffIDs = append(img.Config.RootFS.DiffIDs, diffID)
	img.Config.History = append(img.Config.History, ocispec.History{CreatedBy: "Nydus Converter", Comment: "Nydus Bootstrap Layer"})
	return img, err
}

// layer makes the blob of a layer; work is a directory of its own.
func (n nydus) layer(from, to ocilayout.Dir, l ocispec.Descriptor, work string) (nl nydusLayer, err error) {
	if err := os.Mkdir(work, 0o755); err != nil {
		return nl, err
	}
	blob := filepath.Join(work, "blob")
	if err := n.create(from, l, work, blob); err != nil {
		return nl, err
	}
	nl.desc, err = to.PutFrom(nydusBlob, func(w io.Writer) error { return copyFile(w, blob) })
	if err != nil {
		return nl, err
	}
	nl.desc.Annotations = map[string]string{nydusBlobAnnotation: "true"}
	name := nl.desc.Digest.Encoded() // merging takes the blob's name from that of the file
	if n.ref {
		nl.desc.Annotations[nydusRefAnnotation] = l.Digest.String()
		name = l.Digest.Encoded()
	}
	nl.bootstrap = filepath.Join(work, name)
	return nl, n.open(&nl, blob)
}

func (n nydus) create(from ocilayout.Dir, l ocispec.Descriptor, work, blob string) error {
	if n.ref {
		return nydusImage("create", "--log-level", "warn", "--type", "targz-ref", "--blob-inline-meta",
			"--features", "blob-toc", "--blob", blob, from.Path(l.Digest))
	}
	plain := filepath.Join(work, "tar")
	if err := gunzip(plain, from.Path(l.Digest)); err != nil {
		return err
	}
	args := []string{"create", "--log-level", "warn", "--prefetch-policy", "fs", "--blob", blob,
		"--whiteout-spec", "none", "--fs-version", n.version, "--type", "tar-rafs", "--blob-inline-meta"}
	if n.version == "6" {
		args = append(args, "--features", "blob-toc")
	}
	return nydusImage(append(append(args, n.args...), plain)...)
}

// open takes out of the blob what merging needs.
func (n nydus) open(nl *nydusLayer, blob string) error {
	parts, err := openNydusBlob(blob)
	if err != nil {
		return err
	}
	defer parts.file.Close()
	boot, err := parts.read("image.boot")
	if err != nil {
		return err
	}
	if n.version == "6" {
		meta, err := parts.read("blob.meta")
		if err != nil {
			return err
		}
		header, err := parts.read("blob.meta.header")
		if err != nil {
			return err
		}
		nl.meta = append(append(meta, make([]byte, -len(meta)&4095)...), header...)
	}
	nl.toc = parts.tocDigest
	return os.WriteFile(nl.bootstrap, boot, 0o644)
}

// merge makes one bootstrap of those of the layers and tells which blobs it
// needs.
func (n nydus) merge(layers []nydusLayer, work string) (boot string, blobs []string, err error) {
	boot, report := filepath.Join(work, "bootstrap"), filepath.Join(work, "merged.json")
	args := []string{"merge", "--log-level", "warn", "--prefetch-policy", "fs", "--output-json", report, "--bootstrap", boot}
	for _, l := range layers {
		args = append(args, l.bootstrap)
	}
	if n.ref {
		var digests, tocs, sizes []string
		for _, l := range layers {
			digests = append(digests, l.desc.Digest.Encoded())
			tocs = append(tocs, l.toc.Encoded())
			sizes = append(sizes, strconv.FormatInt(l.desc.Size, 10))
		}
		args = append(args, "--blob-digests", strings.Join(digests, ","), "--blob-toc-digests", strings.Join(tocs, ","),
			"--blob-sizes", strings.Join(sizes, ","))
	}
	if err := nydusImage(args...); err != nil {
		return "", nil, err
	}
	var out struct {
		Blobs []string `json:"blobs"`
	}
	b, err := os.ReadFile(report)
	if err == nil {
		err = json.Unmarshal(b, &out)
	}
	return boot, out.Blobs, err
}

// covered checks that the image has every blob that its bootstrap names.
func (n nydus) covered(blobs []string, layers []ocispec.Descriptor) error {
	have := map[string]bool{}
	for _, l := range layers {
		have[l.Digest.Encoded()] = true
		have[strings.TrimPrefix(l.Annotations[nydusRefAnnotation], "sha256:")] = true
	}
	for _, b := range blobs {
		if !have[b] {
			return fmt.Errorf("the merged bootstrap names blob %s, which no layer is", b)
		}
	}
	return nil
}

// lastLayer is the tar with the bootstrap and the chunk information.
func (n nydus) lastLayer(to ocilayout.Dir, boot string, layers []nydusLayer) (ocispec.Descriptor, digest.Digest, error) {
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	b, err := os.ReadFile(boot)
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	err = tw.WriteHeader(&tar.Header{Name: "image", Mode: 0o755, Typeflag: tar.TypeDir})
	add := func(name string, b []byte) {
		if err == nil {
			err = tw.WriteHeader(&tar.Header{Name: "image/" + name, Mode: 0o444, Size: int64(len(b))})
		}
		if err == nil {
			_, err = tw.Write(b)
		}
	}
	add("image.boot", b)
	for _, l := range layers {
		if len(l.meta) > 0 {
			add(l.desc.Digest.Encoded()+".blob.meta", l.meta)
		}
	}
	if err == nil {
		err = tw.Close()
	}
	if err != nil {
		return ocispec.Descriptor{}, "", err
	}
	desc, err := to.PutFrom(ocispec.MediaTypeImageLayerGzip, func(w io.Writer) error {
		zw := gzip.NewWriter(w)
		if _, err := zw.Write(buf.Bytes()); err != nil {
			return err
		}
		return zw.Close()
	})
	desc.Annotations = map[string]string{nydusVersionAnnotation: n.version, nydusBootstrapAnnotation: "true"}
	return desc, digest.FromBytes(buf.Bytes()), err
}

// nydusImage runs the program.
func nydusImage(args ...string) error {
	program := os.Getenv("TATAMI_NYDUS_IMAGE")
	if program == "" {
		program = "nydus-image"
	}
	var out bytes.Buffer
	// nydusify's default for what to fetch first is everything.
	if err := filter(strings.NewReader("/"), &out, program, args...); err != nil {
		return fmt.Errorf("%w %s", err, out.Bytes())
	}
	return nil
}

func gunzip(to, from string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := os.Create(to)
	if err != nil {
		return err
	}
	if err := (source{file: in}).writeTar(out); err != nil {
		out.Close()
		return err
	}
	return out.Close()
}

func copyFile(w io.Writer, path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = io.Copy(w, f)
	return err
}
