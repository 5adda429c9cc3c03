package registry_test

import (
	"bytes"
	"encoding/json"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/registry"
)

// TestPushDistributionRegistry pushes to a registry that we did not write,
// which has no referrers API.
func TestPushDistributionRegistry(t *testing.T) {
	host := startDistribution(t)
	ctx := t.Context()
	client := newClient(t, fast())
	repo := func(path string) *registry.Repository {
		name, err := reference.ParseNormalizedNamed(host + path)
		if err != nil {
			t.Fatal(err)
		}
		return client.Repository(name)
	}
	x := repo("/library/x")
	known, streamed := random(9_000_000), random(7_000_001)
	if err := x.PushBlob(ctx, describe(known), bytes.NewReader(known)); err != nil {
		t.Fatal(err)
	}
	desc, err := x.PushStream(ctx, "application/x", once{bytes.NewReader(streamed)})
	if err != nil || desc.Digest != describe(streamed).Digest {
		t.Fatalf("stream %+v, %v", desc, err)
	}
	if err := x.PushBlob(ctx, describe(nil), bytes.NewReader(nil)); err != nil {
		t.Errorf("empty blob: %v", err)
	}
	mustHave(t, x, known)
	mustHave(t, x, streamed)
	y := repo("/library/y")
	if ok, err := y.MountBlob(ctx, describe(known), x); err != nil || !ok {
		t.Errorf("mount: %v, %v", ok, err)
	}
	mustHave(t, y, known)
	if ok, err := y.MountBlob(ctx, describe([]byte("none")), x); err != nil || ok {
		t.Errorf("mount of what is not there: %v, %v", ok, err)
	}

	config := ocispec.DescriptorEmptyJSON
	config.Data, config.MediaType = nil, ocispec.MediaTypeImageConfig
	if err := x.PushBlob(ctx, config, bytes.NewReader([]byte("{}"))); err != nil {
		t.Fatal(err)
	}
	layer := describe(known)
	layer.MediaType = ocispec.MediaTypeImageLayer
	doc := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: config, Layers: []ocispec.Descriptor{layer},
	}
	data, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	pushed, err := x.PushManifest(ctx, doc.MediaType, data, "v1")
	if err != nil {
		t.Fatal(err)
	}
	if got, back, err := x.GetManifest(ctx, "v1"); err != nil || got.Digest != pushed.Digest || !bytes.Equal(back, data) {
		t.Errorf("manifest %+v, %v", got, err)
	}
	if has, err := x.Has(ctx, pushed); err != nil || !has {
		t.Errorf("has manifest: %v, %v", has, err)
	}
	for _, n := range []string{"1", "2", "1"} {
		pushReferrer(t, x, pushed, n)
	}
	if list, err := x.Referrers(ctx, pushed.Digest, wanted); err != nil || len(list) != 2 {
		t.Errorf("referrers %+v, %v", list, err)
	}
	doc.Layers[0] = describe([]byte("never pushed"))
	if data, err = json.Marshal(doc); err != nil {
		t.Fatal(err)
	}
	if _, err := x.PushManifest(ctx, doc.MediaType, data, "v2"); !errdefs.IsInvalidArgument(err) && !errdefs.IsNotFound(err) {
		t.Errorf("manifest of a missing blob: %v", err)
	}
}
