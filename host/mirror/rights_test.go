package mirror

import (
	"fmt"
	"testing"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/registry"
)

// Callers make up as many headers as they like, and registries as many objects.
func TestRightsBound(t *testing.T) {
	r := newRights(time.Now)
	named, err := reference.ParseNormalizedNamed("registry.test/app")
	if err != nil {
		t.Fatal(err)
	}
	client := registry.New(registry.Config{})
	defer client.Close()
	c := call{repo: client.Repository(named), kind: "blobs"}
	for i := range maxRights + 10 {
		c.authorization = fmt.Sprint(i)
		r.note(c, registry.Answer{Descriptor: ocispec.Descriptor{Digest: digest.FromString(c.authorization)}})
	}
	if len(r.open) > maxRights || len(r.objects) > maxRights {
		t.Errorf("%d callers and %d objects are remembered", len(r.open), len(r.objects))
	}
	if _, ok := r.find(c, digest.FromString(c.authorization)); !ok {
		t.Error("the last one is forgotten")
	}
}
