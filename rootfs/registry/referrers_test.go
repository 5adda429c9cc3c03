package registry_test

import (
	"fmt"
	"slices"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

const wanted = "application/vnd.test.wanted"

func TestReferrers(t *testing.T) {
	for _, opts := range []registrytest.Options{{}, {NoReferrers: true}, {PageSize: 2}, {Auth: &registrytest.Auth{}}} {
		t.Run(fmt.Sprintf("%+v", opts), func(t *testing.T) {
			reg := registrytest.Start(t, opts)
			img := reg.PushImage("library/x", "v1", registrytest.Image{})
			repo := repository(t, newClient(t, fast()), reg)
			list, err := repo.Referrers(t.Context(), img.Desc.Digest, wanted)
			if err != nil || len(list) != 0 {
				t.Fatalf("before any was pushed: %v, %d", err, len(list))
			}
			var want []digest.Digest
			for i := range 5 {
				blob := reg.PushBlob("library/x", "application/octet-stream", []byte{byte(i)})
				want = append(want, reg.PushReferrer("library/x", img.Desc, wanted, blob).Digest)
				reg.PushReferrer("library/x", img.Desc, "application/vnd.test.other", blob)
			}
			list, err = repo.Referrers(t.Context(), img.Desc.Digest, wanted)
			if err != nil {
				t.Fatal(err)
			}
			if got := digests(list); !slices.Equal(got, want) {
				t.Errorf("listed %v, pushed %v", got, want)
			}
			all, err := repo.Referrers(t.Context(), img.Desc.Digest, "")
			if err != nil || len(all) != 10 {
				t.Errorf("without a type: %v, %d of 10", err, len(all))
			}
			data, err := repo.Manifest(t.Context(), list[0])
			if err != nil || int64(len(data)) != list[0].Size {
				t.Errorf("a listed manifest: %v", err)
			}
		})
	}
}

func digests(list []ocispec.Descriptor) (d []digest.Digest) {
	for _, desc := range list {
		d = append(d, desc.Digest)
	}
	return d
}

// TestReferrersEndless has a registry whose pages never end.
func TestReferrersEndless(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{PageSize: 1})
	img := reg.PushImage("library/x", "v1", registrytest.Image{})
	for i := range 30 {
		reg.PushReferrer("library/x", img.Desc, wanted, reg.PushBlob("library/x", "", []byte{byte(i)}))
	}
	list, err := repository(t, newClient(t, fast()), reg).Referrers(t.Context(), img.Desc.Digest, wanted)
	if err != nil || len(list) != 16 {
		t.Errorf("%v, %d referrers", err, len(list))
	}
}

func TestReferrersFail(t *testing.T) {
	reg := registrytest.Start(t, registrytest.Options{NoReferrers: true})
	repo := repository(t, newClient(t, fast()), reg)
	if _, err := repo.Referrers(t.Context(), "sha256:x/../y", wanted); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a bad digest: %v", err)
	}
	subject := digest.FromString("subject")
	reg.PushManifest("library/x", "sha256-"+subject.Encoded(), ocispec.MediaTypeImageManifest, []byte("{}"))
	if _, err := repo.Referrers(t.Context(), subject, wanted); !errdefs.IsDataLoss(err) {
		t.Errorf("a tag that is no index: %v", err)
	}
	reg.PushManifest("library/x", "sha256-"+subject.Encoded(), ocispec.MediaTypeImageIndex, []byte("{"))
	if _, err := repo.Referrers(t.Context(), subject, wanted); !errdefs.IsDataLoss(err) {
		t.Errorf("a tag that is no JSON: %v", err)
	}
	reg.Fault("", 0, registrytest.Status(500))
	if _, err := repo.Referrers(t.Context(), subject, wanted); !errdefs.IsUnavailable(err) {
		t.Errorf("a registry that is down: %v", err)
	}
}
