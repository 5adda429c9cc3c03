package transport_test

import (
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tools/transport"
)

// TestSelectVariants reads an index that tells variants apart which the configs
// of its images do not name.
func TestSelectVariants(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	var list []ocispec.Descriptor
	variants := []string{"v6", "v7"}
	for _, v := range variants {
		layer := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar(registrytest.File(v, 0o644, v)))))
		d := s.PushImage("x", "", registrytest.Image{
			Layers: []registrytest.Layer{layer}, Platform: ocispec.Platform{OS: "linux", Architecture: "arm"},
		}).Desc
		d.Platform = &ocispec.Platform{OS: "linux", Architecture: "arm", Variant: v}
		list = append(list, d)
	}
	s.PushIndex("x", "v1", false, list...)
	name := s.Host() + "/x:v1"
	client := transport.NewClient(nil)
	defer client.Close()
	src := registrytest.Must(transport.OpenSource(registrytest.Must(transport.Parse(name)), transport.Options{Registry: client}))
	defer src.Close()
	sel, err := transport.Select(t.Context(), src, name, nil)
	if err != nil {
		t.Fatal(err)
	}
	if len(sel.Images) != len(list) {
		t.Fatalf("%d images", len(sel.Images))
	}
	for i, img := range sel.Images {
		if img.Desc.Digest != list[i].Digest || img.Parent != sel.Index {
			t.Errorf("image %d is %s", i, img.Desc.Digest)
		}
		if got, want := image.FormatPlatform(transport.PlatformOf(img)), "linux/arm/"+variants[i]; got != want {
			t.Errorf("image %d is for %s, want %s", i, got, want)
		}
	}
	one, err := transport.Select(t.Context(), src, name, &ocispec.Platform{OS: "linux", Architecture: "arm", Variant: "v7"})
	if err != nil || len(one.Images) != 1 || transport.PlatformOf(one.Images[0]).Variant != "v7" {
		t.Errorf("one platform: %+v, %v", one, err)
	}
}
