package node

import (
	"bytes"
	"encoding/json"
	"errors"
	"io"
	"strings"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/artifact"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/store/shared"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// layerFiles makes and pushes what a publisher makes of an image's layers.
func (g *rig) layerFiles(t *testing.T, name string, layers []registrytest.Layer, spoil func(*index.Layer)) []ocispec.Descriptor {
	t.Helper()
	var files []ocispec.Descriptor
	for _, l := range layers {
		desc := ocispec.Descriptor{Digest: digest.FromBytes(l.Blob), Size: int64(len(l.Blob))}
		made, err := layer.Build(t.Context(), bytes.NewReader(l.Blob), desc, io.Discard, layer.Options{Skeleton: true})
		if err != nil {
			t.Fatal(err)
		}
		spoil(made)
		data := registrytest.Must(index.EncodeLayer(made))
		g.reg.PushBlob("library/"+name, index.LayerType, data)
		files = append(files, artifact.LayerFile(desc.Digest, data))
	}
	return files
}

// pushArtifact pushes an artifact of the image as a referrer.
func (g *rig) pushArtifact(t *testing.T, name string, subject ocispec.Descriptor, files []ocispec.Descriptor) ocispec.Descriptor {
	t.Helper()
	desc, data, err := artifact.New(subject, files...)
	if err != nil {
		t.Fatal(err)
	}
	g.reg.PushBlob("library/"+name, "", ocispec.DescriptorEmptyJSON.Data)
	g.reg.PushManifest("library/"+name, "", ocispec.MediaTypeImageManifest, data)
	return desc
}

func sound(*index.Layer) {}

// With a published index, nothing of the layers is fetched before it is read.
func TestArtifact(t *testing.T) {
	base, app := tree{"bin/sh": text(1, 3<<20), "etc/motd": "hello"}, tree{"app/data": text(2, 1<<20)}
	for _, bound := range []bool{false, true} {
		g := newRig(t)
		layers := []registrytest.Layer{base.gzip(t), app.gzip(t)}
		pushed := g.push("app:v1", layers...)
		desc := g.pushArtifact(t, "app", pushed.Desc, g.layerFiles(t, "app", layers, sound))
		if bound {
			g.reg.Fault("/referrers/", -1, registrytest.Status(500)) // nobody has to ask
			g.reg.PushIndex("library/app", "v1", false, pushed.Desc, artifact.Bind(desc, pushed.Desc.Digest))
		}
		p := g.prepare(t, "app:v1")
		if got := g.layerBytes(pushed); got != 0 || p.Index != "index" || p.Manifest != pushed.Desc.Digest {
			t.Errorf("bound %v: index %q of %s, after %d bytes of layers", bound, p.Index, p.Manifest, got)
		}
		l := g.lease(t, "app:v1")
		g.check(t, l, 1, app)
		if got := g.layerBytes(pushed); got == 0 || got > pushed.Layers[1].Size {
			t.Errorf("bound %v: reading the second layer of %d bytes cost %d", bound, pushed.Layers[1].Size, got)
		}
		g.check(t, l, 0, base)
		if _, ok := l.Find(kindManifest, desc.Digest); ok != bound {
			t.Errorf("bound %v: the artifact is served: %v", bound, ok)
		}
	}
}

// A guest that believes only what the image index binds gets that index, the
// artifact and its files from the node.
func TestBoundObjects(t *testing.T) {
	g := newRig(t)
	layers := []registrytest.Layer{tree{"etc/motd": "hello"}.gzip(t)}
	pushed := g.push("app:v1", layers...)
	files := g.layerFiles(t, "app", layers, sound)
	desc := g.pushArtifact(t, "app", pushed.Desc, files)
	top := g.reg.PushIndex("library/app", "v1", false, pushed.Desc, artifact.Bind(desc, pushed.Desc.Digest))
	g.prepare(t, "app:v1")
	g.restart(t)
	l := g.lease(t, "app:v1")
	var list ocispec.Index
	if err := json.Unmarshal(object(t, l, kindManifest, top.Digest), &list); err != nil {
		t.Fatal(err)
	}
	bound, ok := artifact.Bound(&list, pushed.Desc.Digest)
	if !ok {
		t.Fatalf("the image index binds nothing: %+v", list)
	}
	found, err := artifact.Decode(object(t, l, kindManifest, bound.Digest), pushed.Desc.Digest)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := index.DecodeLayer(object(t, l, kindBlob, found.Layers[pushed.Layers[0].Digest].Digest)); err != nil {
		t.Error(err)
	}
}

// An artifact that is wrong costs the whole layer, not the image, and never
// gives wrong bytes.
func TestBadArtifact(t *testing.T) {
	files := tree{"etc/motd": text(1, 200_000)}
	for name, tc := range map[string]struct {
		spoil func(*index.Layer)
		log   string
	}{
		"other blob":   {func(l *index.Layer) { l.Blob = digest.FromString("other") }, "it is of blob"},
		"other size":   {func(l *index.Layer) { l.BlobSize++ }, "it is of blob"},
		"other diffID": {func(l *index.Layer) { l.DiffID = digest.FromString("other") }, "cannot be held against the diffID"},
	} {
		t.Run(name, func(t *testing.T) {
			g := newRig(t)
			layers := []registrytest.Layer{files.gzip(t)}
			pushed := g.push("app:v1", layers...)
			g.pushArtifact(t, "app", pushed.Desc, g.layerFiles(t, "app", layers, tc.spoil))
			if p := g.prepare(t, "app:v1"); p.Index != "built" {
				t.Errorf("index %q", p.Index)
			}
			if !strings.Contains(g.log.String(), tc.log) {
				t.Errorf("log has no %q:\n%s", tc.log, g.log)
			}
			g.check(t, g.lease(t, "app:v1"), 0, files)
		})
	}
}

// An index that describes other content or other files than the image's config
// is found out as soon as the layer is complete, and nothing of it is served any
// more. Another image with the same content is not the worse for it.
func TestForgedArtifacts(t *testing.T) {
	for name, forge := range map[string]func(*index.Layer){
		"name in the tar": func(l *index.Layer) { l.Skeleton[0] ^= 1 },
		"mode of a file":  func(l *index.Layer) { l.Entries[0].Mode = 0o4755 },
	} {
		t.Run(name, func(t *testing.T) { testForged(t, forge) })
	}
}

// attach opens the first segment of an image as a virtio-fs device does.
func (g *rig) attach(t *testing.T, l *Lease) *shared.Segment {
	t.Helper()
	s, err := l.Share(0)
	if err != nil {
		t.Fatal(err)
	}
	seg, err := shared.Open(s.State, s.Data, s.Off)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = seg.Close() }) // it is only read
	return seg
}

func testForged(t *testing.T, forge func(*index.Layer)) {
	g := newRig(t)
	files := tree{"etc/motd": text(1, 200_000)}
	layers := []registrytest.Layer{files.gzip(t)}
	pushed := g.push("app:v1", layers...)
	g.pushArtifact(t, "app", pushed.Desc, g.layerFiles(t, "app", layers, forge))
	same := g.push("good:v1", layers[0], tree{"x": "y"}.gzip(t))
	g.pushArtifact(t, "good", same.Desc, g.layerFiles(t, "good", layers, sound))
	g.prepare(t, "good:v1")
	if p := g.prepare(t, "app:v1"); p.Index != "index" {
		t.Fatalf("index %q", p.Index)
	}
	l := g.lease(t, "app:v1")
	whole := l.File()
	good := g.lease(t, "good:v1")
	bad, fine := g.attach(t, l), g.attach(t, good)
	second := g.lease(t, "app:v1")
	part, err := second.Prefix(t.Context(), 1)
	if err != nil {
		t.Fatal(err)
	}
	for start := time.Now(); err == nil && time.Since(start) < time.Minute; time.Sleep(10 * time.Millisecond) {
		err = g.read(t.Context(), l, 0, files)
	}
	if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), "publish the index again") {
		t.Errorf("read of a forged layer: %v", err)
	}
	for _, f := range []*File{whole, part} { // as they are mounted on the node
		if _, err := f.ReadAt(t.Context(), make([]byte, 512), 0); !errdefs.IsDataLoss(err) {
			t.Errorf("read of an image with a forged layer: %v", err)
		}
	}
	for name, s := range map[string]*shared.Segment{"a forged": bad, "a segment of a forged and a good": fine} {
		for start := time.Now(); !s.Moved() && time.Since(start) < time.Minute; time.Sleep(time.Millisecond) {
		}
		if _, _, n, _ := s.Map(0); n > 0 {
			t.Errorf("share of %s image gives %d bytes", name, n)
		}
	}
	if s, err := l.Share(0); !errdefs.IsDataLoss(err) {
		t.Errorf("share of a forged image: %v, %v", s, err)
	}
	if _, _, n, _ := g.attach(t, good).Map(0); n == 0 {
		t.Error("the good image is not shared again")
	}
	g.check(t, good, 0, files)
	if err := errors.Join(part.Close(), whole.Close()); err != nil {
		t.Error(err)
	}
	log := g.log
	g.restart(t)
	if !strings.Contains(log.String(), "forged") {
		t.Error("nothing was logged")
	}
	if _, err := g.Lease(t.Context(), g.ref("app:v1"), ""); !errdefs.IsNotFound(err) {
		t.Errorf("lease of a forged image after a restart: %v", err)
	}
}

// What one repository publishes of an image says nothing of the same image in
// another.
func TestArtifactElsewhere(t *testing.T) {
	g := newRig(t)
	files := tree{"etc/motd": text(1, 200_000)}
	layers := []registrytest.Layer{files.gzip(t)}
	good, evil := g.push("good:v1", layers...), g.push("evil:v1", layers...)
	if good.Desc.Digest != evil.Desc.Digest {
		t.Fatal("not the same image")
	}
	forge := func(l *index.Layer) { l.Entries[0].Mode = 0o4755 }
	g.pushArtifact(t, "evil", evil.Desc, g.layerFiles(t, "evil", layers, forge))
	if p := g.prepare(t, "evil:v1"); p.Index != "index" {
		t.Fatalf("index %q", p.Index)
	}
	held := g.lease(t, "evil:v1")
	if _, err := g.Lease(t.Context(), g.ref("good:v1"), ""); !errdefs.IsNotFound(err) {
		t.Errorf("the image of another repository: %v", err)
	}
	if _, err := g.Prepare(t.Context(), g.ref("good:v1"), ""); !errdefs.IsFailedPrecondition(err) || !strings.Contains(err.Error(), "/evil") {
		t.Errorf("while it is in use with the other's index: %v", err)
	}
	held.Close()
	if p := g.prepare(t, "good:v1"); p.Index != "built" {
		t.Errorf("index %q", p.Index)
	}
	l := g.lease(t, "good:v1")
	g.check(t, l, 0, files)
	// Now the node knows the layer itself, which is good for everybody.
	if p := g.prepare(t, "evil:v1"); p.Index != "node" {
		t.Errorf("index %q", p.Index)
	}
}
