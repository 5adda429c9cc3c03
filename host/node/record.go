package node

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/registry"
)

// Names in an image's directory.
const (
	recordFile   = "record.json"
	manifestFile = "manifest.json"
	configFile   = "config.json"
	artifactFile = "artifact.json"
	parentFile   = "parent.json"
	boundFile    = "bound.json"
	forgedFile   = "forged" // a published index that the image uses was found so
	indexFile    = "index"  // encoded index.Image
)

const recordVersion = 2

// record is what the node keeps of one image, beside the files that it
// describes.
type record struct {
	Version  int
	Manifest ocispec.Descriptor
	Config   ocispec.Descriptor
	Artifact ocispec.Descriptor   // the manifest of the index artifact
	Index    ocispec.Descriptor   // its only layer
	Blobs    []ocispec.Descriptor // the image's layers, lowest first
	Layers   []layerRecord        // what was merged, lowest first
	Segments []segmentRecord
	// Parent is the image index that the manifest was chosen from, and Bound the
	// index artifact that it binds, whose files are in the registry. Empty if
	// there is none.
	Parent     ocispec.Descriptor
	Bound      ocispec.Descriptor
	BoundFiles []ocispec.Descriptor
	// Origin is the repository that an index was published in which neither the
	// layers nor the manifest vouch for; empty if there is no such index. The
	// record then counts only for references to that repository.
	Origin string
	// ImageSize is of the one-file image, in bytes.
	ImageSize int64
}

// layerRecord says where the index of a layer is, as layerKey does.
type layerRecord struct {
	Blob digest.Digest `json:"blob"`
	By   digest.Digest `json:"by,omitempty"`
}

func (l layerRecord) key() layerKey { return layerKey{l.Blob, l.By} }

type segmentRecord struct {
	ID    digest.Digest
	Layer digest.Digest // the blob in record.Layers
	Size  int64         // bytes
}

// compressedSize is the sum of the layer blobs in bytes.
func (r *record) compressedSize() int64 {
	sum := int64(0)
	for _, l := range r.Blobs {
		sum += l.Size
	}
	return sum
}

// countsFor says whether the record may be used for an image of a repository.
func (r *record) countsFor(ref reference.Named) bool { return r.Origin == "" || r.Origin == ref.Name() }

// described are the files with descriptors, by name.
func (r *record) described() map[string]ocispec.Descriptor {
	all := map[string]ocispec.Descriptor{
		manifestFile: r.Manifest, configFile: r.Config, artifactFile: r.Artifact, indexFile: r.Index,
	}
	if r.Parent.Digest != "" {
		all[parentFile] = r.Parent
	}
	if r.Bound.Digest != "" {
		all[boundFile] = r.Bound
	}
	return all
}

// saveImage makes an image exist. contents has all files but the record.
func (n *Node) saveImage(r *record, contents map[string][]byte) error {
	data, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("encode record: %w", err)
	}
	contents[recordFile] = data
	if err := n.files.writeDir(n.files.image(r.Manifest.Digest), contents); err != nil {
		return fmt.Errorf("keep image: %w", err)
	}
	return nil
}

// loadRecord reads and checks the record of a directory below images.
func (n *Node) loadRecord(d digest.Digest) (*record, error) {
	dir := n.files.image(d)
	data, err := readBounded(filepath.Join(dir, recordFile), registry.MaxManifest)
	if err != nil {
		return nil, err
	}
	if reason, err := readBounded(filepath.Join(dir, forgedFile), registry.MaxManifest); err == nil {
		return nil, fmt.Errorf("%s: %w", reason, errdefs.ErrDataLoss)
	}
	r := new(record)
	if err := json.Unmarshal(data, r); err != nil {
		return nil, fmt.Errorf("decode record: %w: %w", err, errdefs.ErrDataLoss)
	}
	if r.Version != recordVersion || r.Manifest.Digest != d {
		return nil, fmt.Errorf("record of version %d for %s: %w", r.Version, r.Manifest.Digest, errdefs.ErrDataLoss)
	}
	for name, desc := range r.described() {
		st, err := os.Stat(filepath.Join(dir, name))
		if err != nil {
			return nil, err
		}
		if st.Size() != desc.Size {
			return nil, fmt.Errorf("%s has %d bytes, not %d: %w", name, st.Size(), desc.Size, errdefs.ErrDataLoss)
		}
	}
	return r, nil
}

// readFile reads one file of an image and compares its digest.
func (n *Node) readFile(r *record, name string) ([]byte, error) {
	desc := r.described()[name]
	data, err := readBounded(filepath.Join(n.files.image(r.Manifest.Digest), name), desc.Size)
	if err == nil && desc.Digest.Algorithm().FromBytes(data) != desc.Digest {
		err = fmt.Errorf("%s does not have digest %s: %w", name, desc.Digest, errdefs.ErrDataLoss)
	}
	if err != nil {
		return nil, fmt.Errorf("read image %s: %w (remove the image and prepare it again)", r.Manifest.Digest, err)
	}
	return data, nil
}

// digests lists the entries of dir/<algorithm>/. The name of one begins with a
// digest, which is empty when it does not; rest is what follows it after a dot.
func digests(dir string, each func(d digest.Digest, rest, path string)) error {
	algorithms, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, a := range algorithms {
		if !a.IsDir() {
			each("", "", filepath.Join(dir, a.Name()))
			continue
		}
		names, err := os.ReadDir(filepath.Join(dir, a.Name()))
		if err != nil {
			return err
		}
		for _, e := range names {
			hex, rest, _ := strings.Cut(e.Name(), ".")
			d := digest.NewDigestFromEncoded(digest.Algorithm(a.Name()), hex)
			if d.Validate() != nil {
				d = ""
			}
			each(d, rest, filepath.Join(dir, a.Name(), e.Name()))
		}
	}
	return nil
}
