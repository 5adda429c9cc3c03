package artifact

import (
	"bytes"
	"encoding/json"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/index"
)

var (
	subject = ocispec.Descriptor{MediaType: ocispec.MediaTypeImageManifest, Digest: digest.FromString("image"), Size: 5}
	blob    = digest.FromString("layer")
)

// What New writes, Decode reads; and it is the same every time.
func TestNew(t *testing.T) {
	image, layer := Describe(index.ImageType, []byte("i")), LayerFile(blob, []byte("l"))
	desc, data, err := New(subject, image, layer)
	if err != nil {
		t.Fatal(err)
	}
	again, dataAgain, err := New(subject, image, layer)
	if err != nil || again.Digest != desc.Digest || !bytes.Equal(data, dataAgain) {
		t.Errorf("another artifact the second time: %v", err)
	}
	if desc.Digest != digest.FromBytes(data) || desc.Size != int64(len(data)) || desc.ArtifactType != index.ArtifactType {
		t.Errorf("described as %+v", desc)
	}
	files, err := Decode(data, subject.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if files.Image.Digest != image.Digest || len(files.Layers) != 1 || files.Layers[blob].Digest != layer.Digest {
		t.Errorf("decoded %+v", files)
	}
}

func TestDecodeRefuses(t *testing.T) {
	change := func(f func(*ocispec.Manifest)) []byte {
		_, data, err := New(subject, LayerFile(blob, nil))
		if err != nil {
			t.Fatal(err)
		}
		var m ocispec.Manifest
		if err := json.Unmarshal(data, &m); err != nil {
			t.Fatal(err)
		}
		f(&m)
		if data, err = json.Marshal(m); err != nil {
			t.Fatal(err)
		}
		return data
	}
	for _, tt := range []struct {
		name, want string
		data       []byte
	}{
		{"no JSON", "decode", []byte("{")},
		{"other type", "is no index", change(func(m *ocispec.Manifest) { m.ArtifactType = "x" })},
		{"no subject", "is not of manifest", change(func(m *ocispec.Manifest) { m.Subject = nil })},
		{"other subject", "is not of manifest", change(func(m *ocispec.Manifest) { m.Subject.Digest = blob })},
		{"bad digest", "file 0", change(func(m *ocispec.Manifest) { m.Layers[0].Digest = "sha256:x" })},
		{"negative size", "file 0", change(func(m *ocispec.Manifest) { m.Layers[0].Size = -1 })},
		{"many files", "more than", change(func(m *ocispec.Manifest) { m.Layers = make([]ocispec.Descriptor, maxFiles+1) })},
	} {
		_, err := Decode(tt.data, subject.Digest)
		if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

// An image index binds at most the artifact that names the manifest.
func TestBound(t *testing.T) {
	desc := Describe(ocispec.MediaTypeImageManifest, []byte("artifact"))
	list := &ocispec.Index{Manifests: []ocispec.Descriptor{subject, Bind(desc, blob), Bind(desc, subject.Digest)}}
	got, ok := Bound(list, subject.Digest)
	if !ok || got.Digest != desc.Digest || got.Annotations[AnnotationImage] != subject.Digest.String() {
		t.Errorf("bound is %+v, %v", got, ok)
	}
	if _, ok := Bound(list, desc.Digest); ok {
		t.Error("an artifact for a manifest that has none")
	}
	if _, ok := Bound(nil, subject.Digest); ok {
		t.Error("an artifact without an image index")
	}
}
