package soci

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

const repoName = "library/x"

func repository(t *testing.T, reg *registrytest.Server) *registry.Repository {
	t.Helper()
	client := registry.New(registry.Config{RetryWait: time.Millisecond, RetryMax: 1})
	t.Cleanup(func() { _ = client.Close() }) // never fails
	name, err := reference.ParseNormalizedNamed(reg.Host() + "/" + repoName)
	if err != nil {
		t.Fatal(err)
	}
	return client.Repository(name)
}

// TestFindReal finds the ztocs that the real tool made in a registry: by the
// index that the image names, by the one beside it, and among the referrers.
func TestFindReal(t *testing.T) {
	img := loadReal(t)
	cases := []struct {
		name  string
		image func() Image
		bound bool
		opts  registrytest.Options
	}{
		{"image manifest", func() Image { return img.image(t, TypeV2, false) }, true, registrytest.Options{}},
		{"image index", func() Image { return img.image(t, TypeV2, true) }, true, registrytest.Options{}},
		{"referrers", func() Image { return img.image(t, TypeV1, false) }, false, registrytest.Options{}},
		{"referrers by tag", func() Image { return img.image(t, TypeV1, false) }, false, registrytest.Options{NoReferrers: true}},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			reg := registrytest.Start(t, c.opts)
			img.push(reg)
			repo := repository(t, reg)
			found, err := Find(t.Context(), repo, c.image())
			if err != nil {
				t.Fatal(err)
			}
			want := img.ztocs(t)
			if len(found) != len(want) {
				t.Fatalf("found %v", found)
			}
			for _, l := range img.manifest.Layers {
				z := found[l.Digest]
				data, err := repo.Blob(t.Context(), ocispec.Descriptor{Digest: z.Digest, Size: z.Size})
				if err != nil {
					t.Fatal(err)
				}
				if _, err := Open(data, z.Digest, l); err != nil || z.Digest != want[l.Digest] || z.Bound != c.bound {
					t.Errorf("layer %s: %+v, %v", l.Digest, z, err)
				}
			}
		})
	}
}

// push puts all that the testdata have into a registry.
func (img *realImage) push(reg *registrytest.Server) {
	for _, data := range img.blobs {
		var doc struct{ MediaType string }
		if json.Unmarshal(data, &doc) == nil && doc.MediaType != "" {
			reg.PushManifest(repoName, "", doc.MediaType, data)
		} else {
			reg.PushBlob(repoName, "application/octet-stream", data)
		}
	}
}

// image is the image as the tool found it (TypeV1), or as it made it.
func (img *realImage) image(tb testing.TB, version string, withIndex bool) Image {
	tb.Helper()
	if version == TypeV1 {
		for _, data := range img.blobs {
			var m ocispec.Manifest
			if json.Unmarshal(data, &m) == nil && m.Config.MediaType == TypeV1 {
				return Image{Digest: m.Subject.Digest, Manifest: img.blobs[m.Subject.Digest]}
			}
		}
		tb.Fatal("no index of version 1 in testdata")
	}
	i := Image{Digest: img.desc.Digest, Manifest: img.blobs[img.desc.Digest]}
	if withIndex {
		i.Index = &img.index
	}
	return i
}

// scene is an image in a registry, to which cases add indexes.
type scene struct {
	t      *testing.T
	reg    *registrytest.Server
	layers []ocispec.Descriptor
	image  ocispec.Manifest
	desc   ocispec.Descriptor // of image, when it was pushed
}

func newScene(t *testing.T) *scene {
	b := &scene{t: t, reg: registrytest.Start(t, registrytest.Options{})}
	for i := range 2 {
		d := b.reg.PushBlob(repoName, ocispec.MediaTypeImageLayerGzip, fmt.Append(nil, "layer ", i))
		b.layers = append(b.layers, d)
	}
	b.image = ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Layers: b.layers}
	return b
}

func (b *scene) push(v any) ocispec.Descriptor {
	b.t.Helper()
	data, err := json.Marshal(v)
	if err != nil {
		b.t.Fatal(err)
	}
	return b.reg.PushManifest(repoName, "", ocispec.MediaTypeImageManifest, data)
}

// index is a SOCI index of a type with ztocs for some of the layers, which are
// named by what they are called.
func (b *scene) index(version, called string, layers ...int) ocispec.Manifest {
	m := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: ocispec.Descriptor{MediaType: version, Digest: digest.FromString("{}"), Size: 2},
	}
	if version == TypeV1 {
		m.Subject = &b.desc
	}
	for _, i := range layers {
		m.Layers = append(m.Layers, ocispec.Descriptor{
			MediaType: "application/octet-stream", Digest: digest.FromString(fmt.Sprint(called, i)), Size: 10,
			Annotations: map[string]string{"com.amazon.soci.image-layer-digest": b.layers[i].Digest.String()},
		})
	}
	return m
}

// bind makes the image name an index.
func (b *scene) bind(d digest.Digest) {
	b.image.Annotations = map[string]string{"com.amazon.soci.index-digest": d.String()}
}

// pushImage pushes the image, and must come before indexes with it as subject.
func (b *scene) pushImage() { b.desc = b.push(b.image) }

func TestFind(t *testing.T) {
	cases := []struct {
		name    string
		prepare func(b *scene) *ocispec.Index
		want    string // what the ztocs found are called, by layers, "!" if bound
		fail    string // part of the error
	}{
		{"nothing", func(b *scene) *ocispec.Index { b.pushImage(); return nil }, "- -", ""},
		{"bound comes first", func(b *scene) *ocispec.Index {
			b.bind(b.push(b.index(TypeV2, "bound", 0)).Digest)
			b.pushImage()
			b.push(b.index(TypeV1, "other", 0, 1))
			return nil
		}, "bound! -", ""},
		{"bound by the image index", func(b *scene) *ocispec.Index {
			b.pushImage()
			d := b.push(b.index(TypeV2, "beside", 0, 1))
			d.ArtifactType = TypeV2
			d.Annotations = map[string]string{"com.amazon.soci.image-manifest-digest": b.desc.Digest.String()}
			return &ocispec.Index{Manifests: []ocispec.Descriptor{b.desc, d}}
		}, "beside! beside!", ""},
		{"of another image in the image index", func(b *scene) *ocispec.Index {
			b.pushImage()
			d := b.push(b.index(TypeV2, "beside", 0, 1))
			d.ArtifactType = TypeV2
			d.Annotations = map[string]string{"com.amazon.soci.image-manifest-digest": digest.FromString("x").String()}
			return &ocispec.Index{Manifests: []ocispec.Descriptor{b.desc, d}}
		}, "- -", ""},
		{"referrers fill each other up", func(b *scene) *ocispec.Index {
			b.pushImage()
			b.push(b.index(TypeV1, "first", 0))
			b.push(b.index(TypeV1, "second", 0, 1))
			return nil
		}, "first second", ""},
		{"bound index is missing", func(b *scene) *ocispec.Index {
			b.bind(digest.FromString("missing"))
			b.pushImage()
			b.push(b.index(TypeV1, "other", 1))
			return nil
		}, "- other", digest.FromString("missing").String()},
		{"bound digest is none", func(b *scene) *ocispec.Index {
			b.bind("sha256:12")
			b.pushImage()
			return nil
		}, "- -", "sha256:12"},
		{"bound index is of the first version", func(b *scene) *ocispec.Index {
			b.desc = ocispec.Descriptor{Digest: digest.FromString("x"), Size: 1}
			b.bind(b.push(b.index(TypeV1, "bound", 0)).Digest)
			b.pushImage()
			return nil
		}, "- -", "not " + TypeV2},
		{"another subject", func(b *scene) *ocispec.Index {
			m := b.index(TypeV2, "bound", 0)
			m.Subject = &ocispec.Descriptor{Digest: digest.FromString("x"), Size: 1}
			b.bind(b.push(m).Digest)
			b.pushImage()
			return nil
		}, "- -", "its subject is " + digest.FromString("x").String()},
		{"other layers and other blobs", func(b *scene) *ocispec.Index {
			b.pushImage()
			m := b.index(TypeV1, "ztoc", 0, 1, 1)
			m.Layers[0].Annotations = map[string]string{"com.amazon.soci.image-layer-digest": digest.FromString("x").String()}
			m.Layers[1].MediaType = "application/vnd.amazon.soci.prefetch.v1+json"
			b.push(m)
			return nil
		}, "- ztoc", ""},
		{"sizes", func(b *scene) *ocispec.Index {
			b.pushImage()
			m := b.index(TypeV1, "ztoc", 0, 1)
			m.Layers[0].Size = MaxZtoc + 1
			b.push(m)
			return nil
		}, "- ztoc", "has 268435457 bytes"},
		{"artifact manifest", func(b *scene) *ocispec.Index {
			b.pushImage()
			m := b.index(TypeV1, "blob", 0, 1)
			b.push(map[string]any{"mediaType": "application/vnd.oci.artifact.manifest.v1+json",
				"artifactType": TypeV1, "subject": m.Subject, "blobs": m.Layers})
			return nil
		}, "blob blob", ""},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			b := newScene(t)
			idx := c.prepare(b)
			raw, err := json.Marshal(b.image)
			if err != nil {
				t.Fatal(err)
			}
			found, err := Find(t.Context(), repository(t, b.reg), Image{Digest: b.desc.Digest, Manifest: raw, Index: idx})
			if got := b.called(found, "bound", "other", "beside", "first", "second", "ztoc", "blob"); got != c.want {
				t.Errorf("found %s, want %s", got, c.want)
			}
			if (err != nil) != (c.fail != "") || err != nil && !strings.Contains(err.Error(), c.fail) {
				t.Errorf("error %v, want %q", err, c.fail)
			}
		})
	}
}

// called tells what the ztocs are called.
func (b *scene) called(found map[digest.Digest]Ztoc, names ...string) string {
	byDigest := map[digest.Digest]string{"": "-"}
	for i := range b.layers {
		for _, n := range names {
			byDigest[digest.FromString(fmt.Sprint(n, i))] = n
		}
	}
	var all []string
	for _, l := range b.layers {
		z := found[l.Digest]
		s := byDigest[z.Digest]
		if z.Bound {
			s += "!"
		}
		all = append(all, s)
	}
	return strings.Join(all, " ")
}

// TestFindFaults has a registry that fails.
func TestFindFaults(t *testing.T) {
	b := newScene(t)
	b.bind(b.push(b.index(TypeV2, "bound", 0)).Digest)
	b.pushImage()
	raw, err := json.Marshal(b.image)
	if err != nil {
		t.Fatal(err)
	}
	b.reg.Fault("manifests", -1, registrytest.Status(503))
	b.reg.Fault("referrers", -1, registrytest.Status(503))
	img := Image{Digest: b.desc.Digest, Manifest: raw}
	found, err := Find(t.Context(), repository(t, b.reg), img)
	if len(found) != 0 || !errdefs.IsUnavailable(err) {
		t.Errorf("found %v, error %v", found, err)
	}
	img.Manifest = []byte("{")
	if _, err := Find(t.Context(), repository(t, b.reg), img); !errdefs.IsInvalidArgument(err) {
		t.Errorf("manifest that is none: %v", err)
	}
}

// fixed is a registry in which every manifest has the same bytes.
type fixed []byte

func (f fixed) Manifest(context.Context, ocispec.Descriptor) ([]byte, error) { return f, nil }

func (f fixed) Referrers(context.Context, digest.Digest, string) ([]ocispec.Descriptor, error) {
	return []ocispec.Descriptor{{Digest: digest.FromBytes(f), Size: int64(len(f))}}, nil
}

// FuzzFind finds ztocs by any index of an image that names one, and of one that
// does not.
func FuzzFind(f *testing.F) {
	img := loadReal(f)
	for _, data := range img.blobs {
		if json.Valid(data) {
			f.Add(data)
		}
	}
	images := []Image{img.image(f, TypeV1, false), img.image(f, TypeV2, true)}
	f.Fuzz(func(t *testing.T, data []byte) {
		for _, image := range images {
			found, err := Find(t.Context(), fixed(data), image)
			if err != nil && !errdefs.IsInvalidArgument(err) {
				t.Fatal(err)
			}
			for of, z := range found {
				if z.Digest.Validate() != nil || z.Size < 1 || z.Size > MaxZtoc || !strings.Contains(string(image.Manifest), string(of)) {
					t.Fatalf("layer %s: %+v", of, z)
				}
			}
		}
	})
}
