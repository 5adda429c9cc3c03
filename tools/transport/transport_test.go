package transport_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"io"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tools/transport"
)

func client(t *testing.T) *registry.Client {
	t.Helper()
	c := registry.New(registry.Config{RetryWait: 1})
	t.Cleanup(func() { _ = c.Close() }) // never fails
	return c
}

func parse(t *testing.T, s string) transport.Name {
	t.Helper()
	n, err := transport.Parse(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

func source(t *testing.T, c *registry.Client, name string) transport.Source {
	t.Helper()
	s, err := transport.OpenSource(parse(t, name), transport.Options{Registry: c})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
	return s
}

func dest(t *testing.T, c *registry.Client, name string) transport.Dest {
	t.Helper()
	d, err := transport.OpenDest(parse(t, name), transport.Options{Registry: c})
	if err != nil {
		t.Fatal(err)
	}
	return d
}

// places are where the conformance tests write to and read from: a name
// without its tag.
func places(t *testing.T) map[string]string {
	return map[string]string{
		"registry":                   registrytest.Start(t, registrytest.Options{}).Host() + "/library/x",
		"registry without referrers": registrytest.Start(t, registrytest.Options{NoReferrers: true}).Host() + "/library/x",
		"layout":                     "oci:" + filepath.Join(t.TempDir(), "layout"),
	}
}

func marshal(t *testing.T, doc any) []byte {
	t.Helper()
	data, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// pushImage pushes an image of one layer and returns its descriptor.
func pushImage(t *testing.T, d transport.Dest, content, tag string) (ocispec.Descriptor, registrytest.Layer) {
	t.Helper()
	ctx := t.Context()
	l := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar(registrytest.File("f", 0o644, content)))))
	layer, err := d.PushStream(ctx, ocispec.MediaTypeImageLayerGzip, bytes.NewReader(l.Blob))
	if err != nil {
		t.Fatal(err)
	}
	if want := digest.FromBytes(l.Blob); layer.Digest != want || layer.Size != int64(len(l.Blob)) || layer.MediaType != ocispec.MediaTypeImageLayerGzip {
		t.Errorf("pushed %+v", layer)
	}
	config := marshal(t, ocispec.Image{Platform: image.DefaultPlatform(), RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{l.DiffID}}})
	cd := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageConfig, Digest: digest.FromBytes(config), Size: int64(len(config))}
	if err := d.PushBlob(ctx, cd, bytes.NewReader(config)); err != nil {
		t.Fatal(err)
	}
	m := marshal(t, ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest, Config: cd, Layers: []ocispec.Descriptor{layer}})
	desc, err := d.PushManifest(ctx, ocispec.MediaTypeImageManifest, m, tag)
	if err != nil {
		t.Fatal(err)
	}
	return desc, l
}

func pushReferrer(t *testing.T, d transport.Dest, subject ocispec.Descriptor, artifactType string) ocispec.Descriptor {
	t.Helper()
	empty := []byte("{}")
	cd := ocispec.DescriptorEmptyJSON
	cd.Data = nil
	if err := d.PushBlob(t.Context(), cd, bytes.NewReader(empty)); err != nil {
		t.Fatal(err)
	}
	subject = ocispec.Descriptor{MediaType: subject.MediaType, Digest: subject.Digest, Size: subject.Size}
	m := marshal(t, ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		ArtifactType: artifactType, Config: cd, Layers: []ocispec.Descriptor{cd}, Subject: &subject,
	})
	desc, err := d.PushManifest(t.Context(), ocispec.MediaTypeImageManifest, m, "")
	if err != nil {
		t.Fatal(err)
	}
	return desc
}

// TestPlaces is what every place must do.
func TestPlaces(t *testing.T) {
	for kind, place := range places(t) {
		t.Run(kind, func(t *testing.T) {
			c := client(t)
			ctx := t.Context()
			d := dest(t, c, place+":v1")
			if d.Tag() != "v1" {
				t.Errorf("tag %q", d.Tag())
			}
			desc, layer := pushImage(t, d, "hello", d.Tag())
			var refs []ocispec.Descriptor
			for _, a := range []string{"application/x.a", "application/x.b", "application/x.a"} {
				refs = append(refs, pushReferrer(t, d, desc, a))
			}
			checkRefuses(t, d)
			for _, want := range []bool{true, false} {
				probe := desc
				if !want {
					probe.Digest = digest.FromString("none")
				}
				if has, err := d.Has(ctx, probe); err != nil || has != want {
					t.Errorf("has %s: %v, %v", probe.Digest, has, err)
				}
			}
			if err := d.Close(); err != nil {
				t.Fatal(err)
			}
			s := source(t, c, place+":v1")
			checkImage(t, s, desc, layer)
			list, err := s.Referrers(ctx, desc.Digest, "application/x.a")
			if err != nil || len(list) != 1 || list[0].Digest != refs[0].Digest || list[0].ArtifactType != "application/x.a" {
				t.Errorf("referrers %+v, %v", list, err)
			}
			if list, err = s.Referrers(ctx, desc.Digest, ""); err != nil || len(list) != 2 {
				t.Errorf("all referrers %+v, %v", list, err)
			}
		})
	}
}

func checkRefuses(t *testing.T, d transport.Dest) {
	t.Helper()
	ctx := t.Context()
	good := []byte("some content")
	desc := ocispec.Descriptor{Digest: digest.FromBytes(good), Size: int64(len(good))}
	for name, data := range map[string][]byte{"other": []byte("some c0ntent"), "shorter": good[:5], "empty": nil} {
		if err := d.PushBlob(ctx, desc, bytes.NewReader(data)); !errdefs.IsDataLoss(err) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := d.PushBlob(ctx, desc, io.MultiReader(bytes.NewReader(good[:3]), failing{})); err == nil || !strings.Contains(err.Error(), "on fire") {
		t.Errorf("a reader that fails: %v", err)
	}
	if has, err := d.Has(ctx, desc); err != nil || has {
		t.Errorf("stored what it refused: %v, %v", has, err)
	}
	// The right bytes may have been stored before the one too many was seen.
	if err := d.PushBlob(ctx, desc, strings.NewReader(string(good)+"x")); !errdefs.IsDataLoss(err) {
		t.Errorf("longer: %v", err)
	}
	if _, err := d.PushManifest(ctx, ocispec.MediaTypeImageManifest, []byte("{}"), digest.FromString("x").String()); !errdefs.IsInvalidArgument(err) {
		t.Errorf("manifest under another digest: %v", err)
	}
	stopped, cancel := context.WithCancel(ctx)
	cancel()
	if err := d.PushBlob(stopped, desc, bytes.NewReader(good)); err == nil || !strings.Contains(err.Error(), "canceled") {
		t.Errorf("a context that has ended: %v", err)
	}
	empty := ocispec.Descriptor{Digest: digest.FromBytes(nil)}
	if err := d.PushBlob(ctx, empty, bytes.NewReader(nil)); err != nil {
		t.Errorf("empty blob: %v", err)
	}
	if has, err := d.Has(ctx, empty); err != nil || !has {
		t.Errorf("empty blob: %v, %v", has, err)
	}
}

type failing struct{}

func (failing) Read([]byte) (int, error) { return 0, errors.New("the disk is on fire") }

func checkImage(t *testing.T, s transport.Source, desc ocispec.Descriptor, l registrytest.Layer) {
	t.Helper()
	ctx := t.Context()
	for _, ref := range []string{"", "v1", desc.Digest.String()} {
		got, _, err := s.GetManifest(ctx, ref)
		if err != nil || got.Digest != desc.Digest || got.Size != desc.Size || got.MediaType != desc.MediaType {
			t.Errorf("manifest %q: %+v, %v", ref, got, err)
		}
	}
	if _, _, err := s.GetManifest(ctx, "v2"); !errdefs.IsNotFound(err) {
		t.Errorf("unknown tag: %v", err)
	}
	img, err := transport.Resolve(ctx, s, "the image", image.DefaultPlatform())
	if err != nil || img.Reference != "the image" || img.Layers[0].DiffID != l.DiffID {
		t.Fatalf("image %+v, %v", img, err)
	}
	layer := img.Layers[0].Descriptor
	rc, err := s.Open(ctx, layer)
	if got := readAll(t, rc, err); !bytes.Equal(got, l.Blob) {
		t.Errorf("layer of %d bytes", len(got))
	}
	b := s.LayerBlob(layer)
	rc, err = b.ReadRange(ctx, 3, layer.Size-5)
	if got := readAll(t, rc, err); !bytes.Equal(got, l.Blob[3:layer.Size-2]) {
		t.Errorf("range of %d bytes", len(got))
	}
	if _, err := b.ReadRange(ctx, 3, layer.Size-2); !errdefs.IsOutOfRange(err) {
		t.Errorf("range behind the end: %v", err)
	}
	layer.Size--
	if rc, err := s.Open(ctx, layer); err == nil {
		if _, err = io.Copy(io.Discard, rc); err == nil {
			t.Error("a wrong size was not noticed")
		}
		_ = rc.Close()
	}
	layer.Digest = digest.FromString("none")
	if _, err := s.Open(ctx, layer); !errdefs.IsNotFound(err) {
		t.Errorf("unknown blob: %v", err)
	}
}

func readAll(t *testing.T, rc io.ReadCloser, err error) []byte {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
	defer rc.Close()
	data, err := io.ReadAll(rc)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// tool runs a real tool or skips the test.
func tool(t *testing.T, name string, args ...string) string {
	t.Helper()
	path, err := exec.LookPath(name)
	if err != nil {
		t.Skipf("needs %s: %v", name, err)
	}
	out, err := exec.CommandContext(t.Context(), path, args...).CombinedOutput()
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return string(out)
}
