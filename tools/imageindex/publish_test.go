package imageindex

import (
	"bytes"
	"encoding/json"
	"log/slog"
	"strings"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/artifact"
	"github.com/tatami-containers/tatami/rootfs/formats"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tools/transport"
)

func dest(t *testing.T, name string) transport.Dest {
	t.Helper()
	n, err := transport.Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	client := transport.NewClient(nil)
	dst, err := transport.OpenDest(n, transport.Options{Registry: client})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dst.Close(); err != nil {
			t.Error(err)
		}
		_ = client.Close() // never fails
	})
	return dst
}

// TestPublish publishes to a registry and to a layout, where formats.Finder
// finds the artifact: as a referrer, and when it is bound once and bound.
func TestPublish(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	remote, local := s.Host()+"/"+repo+":v1", "oci:"+t.TempDir()+":v1"
	s.PushImage(repo, "v1", registrytest.Image{Layers: []registrytest.Layer{registrytest.Must(registrytest.Gzip(files("a", "b")))}})
	from, _ := open(t, remote)
	if _, err := transport.Copy(t.Context(), from, dest(t, local), transport.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{remote, local} {
		src, img := open(t, name)
		made, err := Build(t.Context(), src, img, Options{})
		if err != nil {
			t.Fatal(err)
		}
		desc, err := Publish(t.Context(), dest(t, name), img, made)
		if err != nil {
			t.Fatal(err)
		}
		if got := waysOf(t, name); got != "index false "+desc.Digest.String() {
			t.Errorf("%s: %q", name, got)
		}
		data, err := Bind(nil, []Bound{{img, desc}})
		if err != nil {
			t.Fatal(err)
		}
		if _, err := dest(t, name).PushManifest(t.Context(), ocispec.MediaTypeImageIndex, data, "v1"); err != nil {
			t.Fatal(err)
		}
		if got := waysOf(t, name); got != "index true "+desc.Digest.String() {
			t.Errorf("%s: bound: %q", name, got)
		}
	}
}

// waysOf opens an image anew and tells its ways and artifacts.
func waysOf(t *testing.T, name string) string {
	t.Helper()
	src, img := open(t, name)
	var log bytes.Buffer
	f := formats.New(src, src.LayerBlob, img, slog.New(slog.NewTextHandler(&log, nil)))
	f.Discover(t.Context(), true)
	layers, err := f.Layers()
	if err != nil || log.Len() > 0 {
		t.Fatalf("%v %s", err, &log)
	}
	var out []string
	for _, w := range f.Ways(layers[0]) {
		if _, _, err := w.Open(t.Context()); err != nil {
			t.Error(err)
		}
		out = append(out, w.From, map[bool]string{true: "true", false: "false"}[w.Bound])
	}
	for _, a := range f.Artifacts {
		out = append(out, a.Desc.Digest.String())
	}
	return strings.Join(out, " ")
}

func TestBind(t *testing.T) {
	desc := func(name string) ocispec.Descriptor {
		return artifact.Describe(ocispec.MediaTypeImageManifest, []byte(name))
	}
	img := &image.Image{Desc: desc("image")}
	img.Config.Platform = ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v7", OSVersion: "9"}
	second := artifact.Bind(desc("of second"), desc("second").Digest)
	all := []Bound{{img, desc("artifact")}}
	bound := artifact.Bind(desc("artifact"), img.Desc.Digest)
	for _, c := range []struct {
		name   string
		parent *ocispec.Index
		want   []ocispec.Descriptor
	}{
		{"new", nil, []ocispec.Descriptor{img.Desc, bound}},
		{"OCI", &ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{img.Desc, desc("second"), second}},
			[]ocispec.Descriptor{img.Desc, desc("second"), second, bound}},
		{"Docker", &ocispec.Index{MediaType: registrytest.DockerManifestList, Manifests: []ocispec.Descriptor{img.Desc}},
			[]ocispec.Descriptor{img.Desc, bound}},
		{"replaced", &ocispec.Index{
			Manifests:   []ocispec.Descriptor{artifact.Bind(desc("old"), img.Desc.Digest), img.Desc, second},
			Annotations: map[string]string{"kept": "yes"},
		}, []ocispec.Descriptor{img.Desc, second, bound}},
	} {
		data, err := Bind(c.parent, all)
		if err != nil {
			t.Fatal(err)
		}
		var got ocispec.Index
		if err := json.Unmarshal(data, &got); err != nil {
			t.Fatal(err)
		}
		if got.MediaType != ocispec.MediaTypeImageIndex || got.SchemaVersion != 2 {
			t.Errorf("%s: media type %s, version %d", c.name, got.MediaType, got.SchemaVersion)
		}
		if c.parent != nil && got.Annotations["kept"] != c.parent.Annotations["kept"] {
			t.Errorf("%s: annotations %v", c.name, got.Annotations)
		}
		if len(got.Manifests) != len(c.want) {
			t.Fatalf("%s: %+v", c.name, got.Manifests)
		}
		for i, d := range got.Manifests {
			if d.Digest != c.want[i].Digest || d.ArtifactType != c.want[i].ArtifactType {
				t.Errorf("%s: manifest %d is %+v", c.name, i, d)
			}
		}
		if found, ok := artifact.Bound(&got, img.Desc.Digest); !ok || found.Digest != bound.Digest || found.ArtifactType != index.ArtifactType {
			t.Errorf("%s: bound is %+v", c.name, found)
		}
		if p := got.Manifests[0].Platform; c.parent == nil && (p == nil || p.Variant != "v7" || p.OSVersion != "9") {
			t.Errorf("%s: platform %+v", c.name, p)
		}
	}
}

// TestBindVariant takes the platform from the index that an image was chosen
// from: the config's has no variant.
func TestBindVariant(t *testing.T) {
	arm := ocispec.Platform{OS: "linux", Architecture: "arm"}
	img := &image.Image{Desc: artifact.Describe(ocispec.MediaTypeImageManifest, []byte("image"))}
	img.Config.Platform = arm
	arm.Variant = "v6"
	img.Desc.Platform = &arm
	data, err := Bind(nil, []Bound{{img, artifact.Describe(ocispec.MediaTypeImageManifest, []byte("artifact"))}})
	if err != nil {
		t.Fatal(err)
	}
	var got ocispec.Index
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	if p := got.Manifests[0].Platform; p == nil || image.FormatPlatform(*p) != "linux/arm/v6" {
		t.Errorf("platform %+v", p)
	}
}
