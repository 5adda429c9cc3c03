package image_test

import (
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

var _ image.Registry = (*registry.Repository)(nil)

func TestParseReference(t *testing.T) {
	const d = "sha256:7cc4b5aefd1d0cadf8d97d4350462ba51c694ebca145b08d7d41b41acc8db5aa"
	for in, want := range map[string]string{
		"debian":                             "docker.io/library/debian:latest",
		"debian:12":                          "docker.io/library/debian:12",
		"user/x":                             "docker.io/user/x:latest",
		"index.docker.io/library/x":          "docker.io/library/x:latest",
		"localhost:5000/x:tag":               "localhost:5000/x:tag",
		"localhost/x":                        "localhost/x:latest",
		"[::1]:5000/x":                       "[::1]:5000/x:latest",
		"registry.example.com/a/b/c":         "registry.example.com/a/b/c:latest",
		"debian@" + d:                        "docker.io/library/debian@" + d,
		"debian:12@" + d:                     "docker.io/library/debian@" + d,
		"":                                   "",
		"Debian":                             "",
		"x:":                                 "",
		"x@sha256:12":                        "",
		"https://registry.example.com/x":     "",
		"registry.example.com/../x":          "",
		strings.Repeat("a", 300):             "",
		strings.TrimPrefix(d, "sha256:"):     "",
		"x:" + strings.Repeat("a", 129):      "",
		"registry.example.com/x:tag?query=1": "",
	} {
		ref, err := image.ParseReference(in)
		if (err == nil) != (want != "") || err == nil && ref.String() != want {
			t.Errorf("%q: %v, %v; want %q", in, ref, err, want)
		}
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: class of %v", in, err)
		}
	}
}

func TestParsePlatform(t *testing.T) {
	for in, want := range map[string]ocispec.Platform{
		"":             image.DefaultPlatform(),
		"linux/arm64":  {OS: "linux", Architecture: "arm64"},
		"linux/arm/v7": {OS: "linux", Architecture: "arm", Variant: "v7"},
		"linux":        {}, "linux/": {}, "/arm64": {}, "linux/arm/": {}, "linux/arm/v7/x": {}, "/": {},
	} {
		got, err := image.ParsePlatform(in)
		if got.OS != want.OS || got.Architecture != want.Architecture || got.Variant != want.Variant || (err == nil) != (want.OS != "") {
			t.Errorf("%q: %+v, %v", in, got, err)
		}
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Errorf("%q: class of %v", in, err)
		}
	}
}

// fixture is a registry with a client and a layer.
type fixture struct {
	*registrytest.Server
	client *registry.Client
	layer  registrytest.Layer
}

func newFixture(t *testing.T) fixture {
	t.Helper()
	tarball := registrytest.Must(registrytest.Tar(registrytest.File("motd", 0o644, "hello")))
	f := fixture{
		Server: registrytest.Start(t, registrytest.Options{}),
		client: registry.New(registry.Config{}),
		layer:  registrytest.Must(registrytest.Gzip(tarball)),
	}
	t.Cleanup(func() { _ = f.client.Close() }) // never fails
	return f
}

func (f fixture) resolve(t *testing.T, object string, p ocispec.Platform) (*image.Image, error) {
	t.Helper()
	ref, err := image.ParseReference(f.Host() + "/library/x" + object)
	if err != nil {
		t.Fatal(err)
	}
	return image.Resolve(t.Context(), f.client.Repository(ref), ref, p)
}

func platform(s string) ocispec.Platform {
	parts := append(strings.Split(s, "/"), "")
	return ocispec.Platform{OS: parts[0], Architecture: parts[1], Variant: parts[2]}
}

func TestResolve(t *testing.T) {
	for _, docker := range []bool{false, true} {
		t.Run(fmt.Sprintf("docker %v", docker), func(t *testing.T) {
			f := newFixture(t)
			empty := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar())))
			pushed := f.PushImage("library/x", "v1", registrytest.Image{
				Layers: []registrytest.Layer{f.layer, empty, f.layer, empty}, Docker: docker,
				Config: ocispec.ImageConfig{Env: []string{"A=b"}, Entrypoint: []string{"/x"}},
			})
			for _, object := range []string{":v1", "@" + pushed.Desc.Digest.String()} {
				img, err := f.resolve(t, object, image.DefaultPlatform())
				if err != nil {
					t.Fatal(err)
				}
				if img.Reference != f.Host()+"/library/x"+object || img.Desc.Digest != pushed.Desc.Digest {
					t.Errorf("reference %s, digest %s", img.Reference, img.Desc.Digest)
				}
				if digest.FromBytes(img.ManifestBytes) != pushed.Desc.Digest || digest.FromBytes(img.ConfigBytes) != pushed.Config.Digest {
					t.Error("manifest or config are not as pushed")
				}
				if img.Config.Config.Entrypoint[0] != "/x" || len(img.Layers) != 4 {
					t.Errorf("entrypoint %v, %d layers", img.Config.Config.Entrypoint, len(img.Layers))
				}
				for i, l := range img.Layers {
					want := []registrytest.Layer{f.layer, empty}[i%2]
					if l.DiffID != want.DiffID || l.Digest != pushed.Layers[i].Digest || l.MediaType != pushed.Layers[i].MediaType || l.Size != int64(len(want.Blob)) {
						t.Errorf("layer %d is %+v", i, l)
					}
				}
			}
		})
	}
}

// TestResolvePlatform picks from an index, and from an index in an index.
func TestResolvePlatform(t *testing.T) {
	f := newFixture(t)
	var list []ocispec.Descriptor
	for _, p := range []string{
		"unknown/unknown", "windows/amd64", "linux/amd64/v3", "linux/amd64", "linux/arm/v6", "linux/arm/v7",
		"linux/arm64/v8", "linux/arm64/v9", "linux/s390x", "linux/s390x/second",
	} {
		layer := f.layer
		layer.Annotations = map[string]string{"platform": p}
		if p == "linux/s390x/second" {
			p = "linux/s390x" // the first of equals counts
		}
		list = append(list, f.PushImage("library/x", "", registrytest.Image{Platform: platform(p), Layers: []registrytest.Layer{layer}}).Desc)
	}
	oci := f.PushIndex("library/x", "oci", false, list...)
	f.PushIndex("library/x", "docker", true, list...)
	oci.Platform = nil
	nested := f.PushIndex("library/x", "nested", false, oci)
	nested.Platform = nil
	f.PushIndex("library/x", "deep", false, nested)

	for want, got := range map[string]string{
		"linux/amd64": "linux/amd64", "linux/amd64/v2": "linux/amd64", "linux/amd64/v3": "linux/amd64/v3",
		"linux/amd64/v4": "linux/amd64/v3", "linux/x86_64": "linux/amd64", "windows/amd64": "windows/amd64",
		"linux/arm": "linux/arm/v7", "linux/arm/v6": "linux/arm/v6", "linux/arm/v8": "linux/arm/v7",
		"linux/arm64": "linux/arm64/v8", "linux/aarch64": "linux/arm64/v8", "linux/arm64/v8.2": "linux/arm64/v8",
		"linux/s390x": "linux/s390x", "linux/arm/v5": "", "linux/riscv64": "", "windows/arm64": "",
	} {
		for _, tag := range []string{":oci", ":docker", ":nested"} {
			img, err := f.resolve(t, tag, platform(want))
			if got == "" {
				if !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), `"linux/arm64/v9"`) || strings.Contains(err.Error(), "unknown/unknown") {
					if tag != ":nested" || !errdefs.IsNotFound(err) {
						t.Errorf("%s of %s: %v", want, tag, err)
					}
				}
				continue
			}
			if err != nil {
				t.Errorf("%s of %s: %v", want, tag, err)
			} else if have := img.Layers[0].Annotations["platform"]; have != got {
				t.Errorf("%s of %s is %s, want %s", want, tag, have, got)
			}
		}
	}
	if _, err := f.resolve(t, ":deep", platform("linux/amd64")); !errdefs.IsInvalidArgument(err) {
		t.Errorf("index in index in index: %v", err)
	}
}

// TestResolveRefuses pushes what is no image or not a sound one.
func TestResolveRefuses(t *testing.T) {
	f := newFixture(t)
	good := f.PushImage("library/x", "good", registrytest.Image{Layers: []registrytest.Layer{f.layer}})
	manifest := func(change func(*ocispec.Manifest)) []byte {
		var m ocispec.Manifest
		if err := json.Unmarshal(good.Manifest, &m); err != nil {
			t.Fatal(err)
		}
		change(&m)
		data, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	config := func(text string) []byte {
		desc := f.PushBlob("library/x", ocispec.MediaTypeImageConfig, []byte(text))
		return manifest(func(m *ocispec.Manifest) { m.Config = desc })
	}
	const oci = ocispec.MediaTypeImageManifest
	for _, tc := range []struct {
		name, mediaType string
		data            []byte
		class           func(error) bool
		text            string
	}{
		{"no JSON", oci, []byte("{"), errdefs.IsInvalidArgument, "decode the manifest"},
		{"schema 1", "application/vnd.docker.distribution.manifest.v1+prettyjws", []byte("{}"), errdefs.IsInvalidArgument, "obsolete"},
		{"unknown type", "application/x", []byte("{}"), errdefs.IsInvalidArgument, `"application/x"`},
		{"schema version", oci, manifest(func(m *ocispec.Manifest) { m.SchemaVersion = 3 }), errdefs.IsInvalidArgument, "version 3"},
		{"type confusion", registry.DockerManifest, manifest(func(m *ocispec.Manifest) { m.Annotations = map[string]string{"a": "b"} }), errdefs.IsInvalidArgument, "was served as"},
		{"both", oci, []byte(`{"schemaVersion":2,"manifests":[],"layers":[]}`), errdefs.IsInvalidArgument, "same time"},
		{"artifact", oci, manifest(func(m *ocispec.Manifest) { m.Config.MediaType = "application/vnd.helm" }), errdefs.IsInvalidArgument, "application/vnd.helm"},
		{"large config", oci, manifest(func(m *ocispec.Manifest) { m.Config.Size = 1 << 40 }), errdefs.IsInvalidArgument, "config has"},
		{"bad layer digest", oci, manifest(func(m *ocispec.Manifest) { m.Layers[0].Digest = "sha256:../.." }), errdefs.IsInvalidArgument, "layer 0"},
		{"negative layer", oci, manifest(func(m *ocispec.Manifest) { m.Layers[0].Size = -1 }), errdefs.IsInvalidArgument, "layer 0"},
		{"layer count", oci, manifest(func(m *ocispec.Manifest) { m.Layers = nil }), errdefs.IsInvalidArgument, "0 layers, the config 1 diffIDs"},
		{"many layers", oci, manifest(func(m *ocispec.Manifest) { m.Layers = make([]ocispec.Descriptor, 513) }), errdefs.IsInvalidArgument, "513 layers"},
		{"lost config", oci, manifest(func(m *ocispec.Manifest) { m.Config.Digest = digest.FromString("x") }), errdefs.IsNotFound, "blob"},
		{"config size", oci, manifest(func(m *ocispec.Manifest) { m.Config.Size++ }), errdefs.IsDataLoss, "blob"},
		{"config no JSON", oci, config("[]"), errdefs.IsInvalidArgument, "decode the config"},
		{"config diffID", oci, config(`{"rootfs":{"diff_ids":["x"]}}`), errdefs.IsInvalidArgument, "diffID 0"},
		{"other platform", oci, config(`{"os":"linux","architecture":"mips","rootfs":{"diff_ids":["` + f.layer.DiffID.String() + `"]}}`), errdefs.IsNotFound, `"linux/mips"`},
		{"empty index", ocispec.MediaTypeImageIndex, []byte(`{"schemaVersion":2}`), errdefs.IsNotFound, "available: none"},
		{"index of a bad digest", ocispec.MediaTypeImageIndex, []byte(`{"schemaVersion":2,"manifests":[{"digest":"x"}]}`), errdefs.IsInvalidArgument, "manifest 0"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f.PushManifest("library/x", "bad", tc.mediaType, tc.data)
			_, err := f.resolve(t, ":bad", image.DefaultPlatform())
			if err == nil || !tc.class(err) || !strings.Contains(err.Error(), tc.text) || !strings.Contains(err.Error(), "library/x:bad") {
				t.Errorf("error %v", err)
			}
		})
	}
	if _, err := f.resolve(t, ":good", image.DefaultPlatform()); err != nil {
		t.Error(err)
	}
	if _, err := f.resolve(t, ":unknown", image.DefaultPlatform()); !errdefs.IsNotFound(err) {
		t.Errorf("unknown tag: %v", err)
	}
}

// TestResolveRequests counts the exchanges of a start: manifest and config.
func TestResolveRequests(t *testing.T) {
	f := newFixture(t)
	f.PushImage("library/x", "v1", registrytest.Image{Layers: []registrytest.Layer{f.layer}})
	if _, err := f.resolve(t, ":v1", image.DefaultPlatform()); err != nil {
		t.Fatal(err)
	}
	if n := len(f.Requests("")); n != 2 {
		t.Errorf("%d requests", n)
	}
}

// TestResolveWithoutPlatforms takes an index whose only image has none.
func TestResolveWithoutPlatforms(t *testing.T) {
	f := newFixture(t)
	desc := f.PushImage("library/x", "", registrytest.Image{Layers: []registrytest.Layer{f.layer}}).Desc
	desc.Platform = nil
	f.PushManifest("library/x", "v1", ocispec.MediaTypeImageIndex, registrytest.Must(json.Marshal(ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, Manifests: []ocispec.Descriptor{desc},
	})))
	if _, err := f.resolve(t, ":v1", image.DefaultPlatform()); err != nil {
		t.Error(err)
	}
}
