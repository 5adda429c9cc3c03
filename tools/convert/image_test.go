package convert_test

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"log/slog"
	"reflect"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tools/check"
	"github.com/tatami-containers/tatami/tools/convert"
	"github.com/tatami-containers/tatami/tools/progress"
	"github.com/tatami-containers/tatami/tools/transport"
)

const repo = "library/x"

// dest opens an image's name for writing.
func dest(t *testing.T, name string) transport.Dest {
	t.Helper()
	return registrytest.Must(transport.OpenDest(registrytest.Must(transport.Parse(name)), options(t)))
}

func options(t *testing.T) transport.Options {
	client := transport.NewClient(nil)
	t.Cleanup(func() { _ = client.Close() }) // never fails
	return transport.Options{Registry: client}
}

// selected opens an image's name for reading.
func selected(t *testing.T, name string) (transport.Source, *image.Image) {
	t.Helper()
	src := registrytest.Must(transport.OpenSource(registrytest.Must(transport.Parse(name)), options(t)))
	sel, err := transport.Select(t.Context(), src, name, nil)
	if err != nil {
		t.Fatal(err)
	}
	return src, sel.Images[0]
}

// TestImage converts an image with layers that come twice and an empty one,
// from OCI's and from Docker's types, and checks what came out.
func TestImage(t *testing.T) {
	a, b := torture.NewTar(), torture.NewTar()
	a.Random("large", 200_000)
	a.File("first", "x")
	b.File("second", "y")
	layers := []registrytest.Layer{
		registrytest.Must(registrytest.Gzip(a.Bytes())), registrytest.Must(registrytest.Gzip(torture.NewTar().Bytes())),
		registrytest.Must(registrytest.Gzip(b.Bytes())),
	}
	layers = append(layers, layers[0], layers[1])
	for name, format := range formats {
		for _, docker := range []bool{false, true} {
			for _, profile := range [][]string{nil, {"first", "none"}} {
				s := registrytest.Start(t, registrytest.Options{})
				pushed := s.PushImage(repo, "v1", registrytest.Image{Layers: layers, Docker: docker, Annotations: map[string]string{"kept": "yes"}})
				src, from := selected(t, s.Host()+"/"+repo+":v1")
				to := s.Host() + "/" + repo + ":v2"
				desc, r, err := convert.Image(t.Context(), src, dest(t, to), from, convert.Options{Format: format, Profile: profile}, "v2", progress.None)
				if err != nil {
					t.Fatalf("%s: %v", name, err)
				}
				got, img := selected(t, to)
				if desc.MediaType != ocispec.MediaTypeImageManifest || img.Desc.Digest != desc.Digest || img.Manifest.Annotations["kept"] != "yes" ||
					img.Manifest.Config.MediaType != ocispec.MediaTypeImageConfig || len(img.Layers) != 5 {
					t.Errorf("%s: %+v", name, img.Manifest)
				}
				size := int64(0)
				for i, l := range img.Layers {
					if l.Digest != img.Layers[i%3].Digest || l.DiffID != img.Layers[i%3].DiffID || strings.Contains(l.MediaType, "docker") {
						t.Errorf("%s: layer %d is %+v", name, i, l)
					}
					if i < 3 {
						size += l.Size
					}
				}
				if r.Source != pushed.Desc.Digest || r.Manifest != desc.Digest || r.After != size || r.Before != distinctSize(pushed.Layers) || r.Plain < 200_000 {
					t.Errorf("%s: report %+v", name, r)
				}
				checked, err := check.Image(t.Context(), got, img, progress.None, slog.New(slog.DiscardHandler))
				if err != nil || checked.Problems != 0 || len(checked.Layers[0].Ways) != 2 {
					t.Errorf("%s, docker %v, profile %q: %v, %+v", name, docker, profile, err, checked)
				}
			}
		}
	}
}

func distinctSize(all []ocispec.Descriptor) (n int64) {
	seen := map[digest.Digest]bool{}
	for _, d := range all {
		if !seen[d.Digest] {
			n += d.Size
		}
		seen[d.Digest] = true
	}
	return n
}

// TestConfigKeeps holds that fields that OCI does not know stay.
func TestConfigKeeps(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	l := registrytest.Must(registrytest.Gzip(base()))
	desc := s.PushBlob(repo, l.MediaType, l.Blob)
	config := `{"architecture":"amd64","os":"linux","odd":{"a":[1,2]},"config":{"OnBuild":["x"]},"rootfs":{"type":"layers","diff_ids":["` + l.DiffID.String() + `"]}}`
	m := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Config: s.PushBlob(repo, ocispec.MediaTypeImageConfig, []byte(config)), Layers: []ocispec.Descriptor{desc}}
	m.SchemaVersion = 2
	s.PushManifest(repo, "v1", m.MediaType, registrytest.Must(json.Marshal(m)))
	src, from := selected(t, s.Host()+"/"+repo+":v1")
	to := "oci:" + t.TempDir()
	if _, _, err := convert.Image(t.Context(), src, dest(t, to), from, convert.Options{Format: convert.EStargz}, "latest", progress.None); err != nil {
		t.Fatal(err)
	}
	_, img := selected(t, to)
	var before, after map[string]any
	must(json.Unmarshal([]byte(config), &before))
	must(json.Unmarshal(img.ConfigBytes, &after))
	delete(before, "rootfs")
	rootfs := after["rootfs"].(map[string]any)
	delete(after, "rootfs")
	if !reflect.DeepEqual(before, after) || len(rootfs["diff_ids"].([]any)) != 1 || rootfs["diff_ids"].([]any)[0] == l.DiffID.String() {
		t.Errorf("config %v, rootfs %v", after, rootfs)
	}
}

// TestImageErrors has images and destinations with which converting ends, and
// all that it has started too.
func TestImageErrors(t *testing.T) {
	wrong := registrytest.Must(registrytest.Gzip(base()))
	wrong.DiffID = digest.FromString("x")
	s := registrytest.Start(t, registrytest.Options{})
	s.PushImage(repo, "wrong", registrytest.Image{Layers: []registrytest.Layer{wrong}})
	s.PushImage(repo, "good", registrytest.Image{Layers: []registrytest.Layer{registrytest.Must(registrytest.Gzip(base()))}})
	s.PushImage(repo, "odd", registrytest.Image{Layers: []registrytest.Layer{{Blob: []byte("x"), MediaType: "application/x-odd", DiffID: digest.FromString("x")}}})
	failed := errors.New("no room")
	for _, c := range []struct {
		tag  string
		fail int64 // the destination fails after so many bytes; 0 is never
		is   func(error) bool
	}{
		{"wrong", 0, errdefs.IsDataLoss},
		{"odd", 0, errdefs.IsInvalidArgument},
		{"good", 1, func(err error) bool { return errors.Is(err, failed) }},
		{"good", 500_000, func(err error) bool { return errors.Is(err, failed) }},
	} {
		remote, _ := selected(t, s.Host()+"/"+repo+":"+c.tag)
		layout := "oci:" + t.TempDir()
		local := dest(t, layout+":v1")
		if _, err := transport.Copy(t.Context(), remote, local, transport.CopyOptions{}); err != nil {
			t.Fatal(err)
		}
		src, img := selected(t, layout)
		before := runtime.NumGoroutine()
		_, r, err := convert.Image(t.Context(), src, failing{local, c.fail, failed}, img, convert.Options{Format: convert.ZstdChunked}, "v2", progress.None)
		if r != nil || !c.is(err) || !strings.Contains(err.Error(), img.Layers[0].Digest.String()) {
			t.Errorf("%s: %v", c.tag, err)
		}
		for deadline := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > before && time.Now().Before(deadline); {
			time.Sleep(time.Millisecond) // what has sent its last word still has to end
		}
		if n := runtime.NumGoroutine(); n > before {
			t.Errorf("%s: %d goroutines, there were %d", c.tag, n, before)
		}
		if _, _, err := src.GetManifest(t.Context(), "v2"); !errdefs.IsNotFound(err) {
			t.Errorf("%s: the image is there: %v", c.tag, err)
		}
	}
}

// failing is a destination that fails in the middle of a blob.
type failing struct {
	transport.Dest
	after int64
	err   error
}

func (f failing) PushStream(ctx context.Context, mediaType string, r io.Reader) (ocispec.Descriptor, error) {
	if f.after == 0 {
		return f.Dest.PushStream(ctx, mediaType, r)
	}
	_, _ = io.CopyN(io.Discard, r, f.after) // less than there is
	return ocispec.Descriptor{}, f.err
}
