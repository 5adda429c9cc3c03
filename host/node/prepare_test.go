package node

import (
	"context"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// A plain image is fetched exactly once, and after that read without its
// registry.
func TestPrepareGzip(t *testing.T) {
	g := newRig(t)
	base, app := tree{"bin/sh": text(1, 300_000), "etc/motd": "hello"}, tree{"app/data": text(2, 3<<20), "app/empty": ""}
	pushed := g.push("app:v1", base.gzip(t), app.gzip(t), registrytest.Uncompressed(tree{"x": "y"}.tar(t)))
	size := int64(0)
	for _, l := range pushed.Layers {
		size += l.Size
	}
	p := g.prepare(t, "app:v1")
	if p.Manifest != pushed.Desc.Digest || digest.FromBytes(p.Config) != pushed.Config.Digest || p.Index != "built" {
		t.Errorf("prepared %+v", p)
	}
	if got := g.layerBytes(pushed); got != size || p.CompressedSize != size {
		t.Errorf("the registry sent %d bytes of %d; compressed size %d", got, size, p.CompressedSize)
	}
	// The (empty) list of what refers to the image is not counted.
	if total := g.reg.Total().Bytes; p.Fetched > total || p.Fetched+200 < total {
		t.Errorf("fetched %d, the registry sent %d", p.Fetched, total)
	}
	if len(p.Phases) < 4 || p.Phases[0].Name != "resolve" {
		t.Errorf("phases %v", p.Phases)
	}
	g.reg.Reset()
	again := g.prepare(t, "app:v1")
	if again.Index != "node" || again.Manifest != p.Manifest || again.ImageSize != p.ImageSize || again.Fetched != 0 {
		t.Errorf("second time %+v", again)
	}
	if total := g.reg.Total(); total.Bytes != 0 || total.Requests != 1 {
		t.Errorf("the second time cost %+v", total)
	}
	g.reg.Close()
	l := g.lease(t, "app:v1")
	g.check(t, l, 0, base)
	g.check(t, l, 1, app)
	g.check(t, l, 2, tree{"x": "y"})
}

// The objects of an image are what the registry has, and the index artifact
// leads from the image to its index.
func TestObjects(t *testing.T) {
	g := newRig(t)
	pushed := g.push("app:v1", tree{"a": text(1, 100_000)}.gzip(t))
	p := g.prepare(t, "app:v1")
	l := g.lease(t, "app:v1")
	if string(object(t, l, kindManifest, p.Manifest)) != string(pushed.Manifest) {
		t.Error("the manifest is not as pushed")
	}
	if string(object(t, l, kindBlob, pushed.Config.Digest)) != string(p.Config) {
		t.Error("the config is not as pushed")
	}
	if d := pushed.Layers[0].Digest; digest.FromBytes(object(t, l, kindBlob, d)) != d {
		t.Error("the layer is not as pushed")
	}
	refs := l.Referrers()
	if len(refs) != 1 || refs[0].ArtifactType != index.ArtifactType {
		t.Fatalf("referrers %v", refs)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(object(t, l, kindManifest, refs[0].Digest), &m); err != nil {
		t.Fatal(err)
	}
	if m.Subject.Digest != p.Manifest || m.ArtifactType != index.ArtifactType || m.Layers[0].MediaType != index.ImageType {
		t.Errorf("artifact %+v", m)
	}
	if got := object(t, l, kindBlob, m.Config.Digest); string(got) != "{}" {
		t.Errorf("artifact's config is %q", got)
	}
	img, err := index.DecodeImage(object(t, l, kindBlob, m.Layers[0].Digest))
	if err != nil || img.Manifest != p.Manifest || img.Size() != p.ImageSize || len(img.Segments) != 1 {
		t.Fatalf("index %+v, %v", img, err)
	}
	if desc, ok := l.Find(kindSegment, img.Segments[0].ID); !ok || desc.Size != img.Segments[0].Table.Size {
		t.Errorf("segment %+v %v", desc, ok)
	}
	for _, kind := range []string{kindManifest, kindBlob, kindSegment, "x"} {
		if _, ok := l.Find(kind, digest.FromString("other")); ok {
			t.Errorf("%s: an unknown digest is found", kind)
		}
	}
	if _, ok := l.Find(kindBlob, p.Manifest); ok {
		t.Error("a manifest is found among the blobs")
	}
	if _, err := l.Open(t.Context(), kindSegment, img.Segments[0].ID, 1<<40, 1); !errdefs.IsInvalidArgument(err) {
		t.Errorf("a range behind the end: %v", err)
	}
}

// Two images that share a layer and are prepared at the same time fetch it once.
func TestSharedLayer(t *testing.T) {
	g := newRig(t)
	shared := tree{"lib/shared": text(1, 2<<20)}
	layer := shared.gzip(t)
	a := g.push("a:v1", layer, tree{"a": "a"}.gzip(t))
	g.push("b:v1", layer, tree{"b": "b"}.gzip(t))
	g.reg.Fault(a.Layers[0].Digest.String(), 1, registrytest.Delay(300*time.Millisecond))
	var wg sync.WaitGroup
	for range 3 {
		wg.Go(func() { g.prepare(t, "a:v1") })
		wg.Go(func() { g.prepare(t, "b:v1") })
	}
	wg.Wait()
	if s := g.reg.BlobStats(a.Layers[0].Digest); s.Bytes != a.Layers[0].Size || s.Requests != 1 {
		t.Errorf("the shared layer of %d bytes cost %+v", a.Layers[0].Size, s)
	}
	// The reference itself is resolved once for all three.
	if n := len(g.reg.Requests("/a/manifests/")); n != 1 {
		t.Errorf("%d requests for one manifest", n)
	}
	g.check(t, g.lease(t, "a:v1"), 0, shared)
	g.check(t, g.lease(t, "b:v1"), 0, shared)
}

// Of an eStargz layer only its TOC is fetched before the image can be mounted;
// the rest follows when it is read, and is verified.
func TestEStargz(t *testing.T) {
	g := newRig(t)
	files := tree{"bin/large": text(1, 4<<20), "etc/motd": text(2, 50_000)}
	pushed := g.push("app:v1", files.estargz(t))
	p := g.prepare(t, "app:v1")
	blob := pushed.Layers[0]
	before := g.reg.BlobStats(blob.Digest)
	if p.Index != "toc" || before.Bytes > 600<<10 || before.Bytes*4 > blob.Size || before.Requests > 2 {
		t.Fatalf("index %q after %+v of %d bytes", p.Index, before, blob.Size)
	}
	for _, r := range g.reg.Requests(blob.Digest.String()) {
		if r.Range == "" {
			t.Error("a whole blob was asked for")
		}
	}
	l := g.lease(t, "app:v1")
	g.check(t, l, 0, tree{"etc/motd": files["etc/motd"]})
	if after := g.reg.BlobStats(blob.Digest); after.Bytes-before.Bytes > 3<<20 {
		t.Errorf("a small file cost %d bytes", after.Bytes-before.Bytes)
	}
	g.check(t, l, 0, files)
	g.reg.Close()
	g.check(t, l, 0, files) // kept
}

// Wrong bytes of a lazily read layer are noticed, and never become file content.
func TestLazyCorrupt(t *testing.T) {
	g := newRig(t)
	files := tree{"f": text(1, 3<<20)}
	pushed := g.push("app:v1", files.estargz(t))
	g.prepare(t, "app:v1")
	l := g.lease(t, "app:v1")
	end := g.reg.Fault(pushed.Layers[0].Digest.String(), 0, registrytest.Corrupt(1000, 2000, 100_000))
	if err := g.read(t.Context(), l, 0, files); err == nil {
		t.Fatal("corrupt bytes were served")
	}
	end()
	deadline := time.Now().Add(20 * time.Second) // the store asks a source that failed later again
	err := g.read(t.Context(), l, 0, files)
	for err != nil && time.Now().Before(deadline) {
		time.Sleep(50 * time.Millisecond)
		err = g.read(t.Context(), l, 0, files)
	}
	if err != nil {
		t.Fatal(err)
	}
}

// A TOC that cannot be used costs the whole layer, not the image.
func TestBadTOC(t *testing.T) {
	g := newRig(t)
	files := tree{"f": text(1, 1<<20)}
	layer := files.estargz(t)
	layer.Annotations = map[string]string{"containerd.io/snapshot/stargz/toc.digest": digest.FromString("other").String()}
	g.push("app:v1", layer)
	if p := g.prepare(t, "app:v1"); p.Index != "built" {
		t.Fatalf("index from %q", p.Index)
	}
	g.check(t, g.lease(t, "app:v1"), 0, files)
	if !strings.Contains(g.log.String(), "another way is taken") {
		t.Error("nothing was logged")
	}
}

// What an image says of the TOC of a layer that it shares does not count for
// other images.
func TestForeignTOC(t *testing.T) {
	g := newRig(t)
	files := tree{"f": text(1, 1<<20)}
	layer := files.estargz(t)
	g.push("annotated:v1", layer)
	layer.Annotations = nil
	g.push("plain:v1", layer)
	if p := g.prepare(t, "annotated:v1"); p.Index != "toc" {
		t.Fatalf("index from %q", p.Index)
	}
	if p := g.prepare(t, "plain:v1"); p.Index != "built" {
		t.Fatalf("index from %q", p.Index)
	}
	g.check(t, g.lease(t, "plain:v1"), 0, files)
	g.check(t, g.lease(t, "annotated:v1"), 0, files)
	// The whole blob has been verified now, which is better than any TOC.
	third := files.estargz(t)
	third.Annotations["containerd.io/snapshot/stargz/toc.digest"] = digest.FromString("forged").String()
	g.push("third:v1", third)
	if p := g.prepare(t, "third:v1"); p.Index != "node" {
		t.Fatalf("index from %q", p.Index)
	}
}

// Everything that can be wrong with a layer or a registry is an error that says
// so and leaves nothing behind; when it is put right, the same call works.
func TestFailures(t *testing.T) {
	files := tree{"a": text(1, 1<<20), "b": text(2, 5000)}
	for _, tc := range []struct {
		name  string
		spoil func(g *rig, p registrytest.Pushed) (mend func())
		class func(error) bool
		text  string
	}{
		{"corrupt layer", func(g *rig, p registrytest.Pushed) func() {
			return g.reg.Fault(p.Layers[0].Digest.String(), 0, registrytest.Corrupt(100_000))
		}, isCorrupt, "layer sha256:"},
		{"corrupt end of a layer", func(g *rig, p registrytest.Pushed) func() {
			return g.reg.Fault(p.Layers[0].Digest.String(), 0, registrytest.Corrupt(p.Layers[0].Size-1))
		}, isCorrupt, "layer sha256:"},
		{"truncated layer", func(g *rig, p registrytest.Pushed) func() {
			return g.reg.Fault(p.Layers[0].Digest.String(), 0, registrytest.Truncate(5000))
		}, errdefs.IsUnavailable, "blob sha256:"},
		{"stalled layer", func(g *rig, p registrytest.Pushed) func() {
			return g.reg.Fault(p.Layers[0].Digest.String(), 0, registrytest.Stall(5000, registrytest.Forever))
		}, errdefs.IsUnavailable, "blob sha256:"},
		{"layer missing", func(g *rig, p registrytest.Pushed) func() {
			return g.reg.Fault(p.Layers[0].Digest.String(), 0, registrytest.Status(404))
		}, errdefs.IsNotFound, "blob sha256:"},
		{"server error", func(g *rig, p registrytest.Pushed) func() {
			return g.reg.Fault("/blobs/", 0, registrytest.Status(500))
		}, errdefs.IsUnavailable, "500"},
		{"refused", func(g *rig, p registrytest.Pushed) func() {
			return g.reg.Fault("/manifests/", 0, registrytest.Status(401))
		}, errdefs.IsUnauthorized, "credentials"},
		{"corrupt manifest", func(g *rig, p registrytest.Pushed) func() {
			return g.reg.Fault("/manifests/", 0, registrytest.Corrupt(20))
		}, errdefs.IsDataLoss, "digest"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			g := newRig(t)
			pushed := g.push("app:v1", files.gzip(t), tree{"c": "c"}.gzip(t))
			mend := tc.spoil(g, pushed)
			_, err := g.Prepare(t.Context(), g.ref("app:v1"), "")
			if err == nil || !tc.class(err) || !strings.Contains(err.Error(), tc.text) {
				t.Fatalf("error: %v", err)
			}
			g.nothingKept(t)
			if _, err := g.Lease(t.Context(), g.ref("app:v1"), ""); !errdefs.IsNotFound(err) {
				t.Errorf("lease: %v", err)
			}
			mend()
			g.prepare(t, "app:v1")
			g.check(t, g.lease(t, "app:v1"), 0, files)
		})
	}
}

// Of two images that share a layer, the one whose config lies about it is
// refused, whichever comes first.
func TestForgedDiffID(t *testing.T) {
	files := tree{"a": text(1, 100_000)}
	for _, order := range [][]string{{"honest:v1", "forged:v1"}, {"forged:v1", "honest:v1"}} {
		g := newRig(t)
		layer := files.gzip(t)
		g.push("honest:v1", layer)
		layer.DiffID = digest.FromString("another")
		g.push("forged:v1", layer)
		for _, object := range order {
			_, err := g.Prepare(t.Context(), g.ref(object), "")
			if object == "honest:v1" && err != nil || object == "forged:v1" && !errdefs.IsDataLoss(err) {
				t.Errorf("%v: %s: %v", order, object, err)
			}
		}
		g.check(t, g.lease(t, "honest:v1"), 0, files)
	}
}

// isCorrupt is for a blob with wrong bytes: they may break the tar in it before
// the digest is known.
func isCorrupt(err error) bool { return errdefs.IsDataLoss(err) || errdefs.IsInvalidArgument(err) }

func TestRefusedImages(t *testing.T) {
	g := newRig(t)
	secret := tree{"a": "a"}.gzip(t)
	secret.MediaType = "application/vnd.oci.image.layer.v1.tar+gzip+encrypted"
	g.push("secret:v1", tree{"b": text(1, 100_000)}.gzip(t), secret)
	forged := tree{"a": "a"}.gzip(t)
	forged.DiffID = digest.FromString("another")
	g.push("forged:v1", forged)
	garbage := registrytest.Layer{Blob: []byte("no tar at all, and longer than a tar's header: " + text(1, 1024)), MediaType: ocispec.MediaTypeImageLayer, DiffID: digest.FromString("x")}
	g.push("garbage:v1", garbage)
	for _, tc := range []struct {
		ref, platform string
		class         func(error) bool
		text          []string
	}{
		{g.ref("secret:v1"), "", errdefs.IsInvalidArgument, []string{"layer sha256:", "+encrypted", "tar+gzip or tar+zstd"}},
		{g.ref("forged:v1"), "", errdefs.IsDataLoss, []string{"diffID", digest.FromString("another").String(), "forged"}},
		{g.ref("garbage:v1"), "", errdefs.IsInvalidArgument, []string{"layer sha256:"}},
		{g.ref("absent:v1"), "", errdefs.IsNotFound, []string{"library/absent", "check the name"}},
		{g.ref("secret:v1"), "linux/riscv64", errdefs.IsNotFound, []string{"riscv64"}},
		{g.ref("secret:v1"), "riscv64", errdefs.IsInvalidArgument, []string{"os/architecture"}},
		{"Not A Reference", "", errdefs.IsInvalidArgument, []string{"Not A Reference"}},
		{"127.0.0.1:1/x:v1", "", errdefs.IsUnavailable, []string{"127.0.0.1:1"}},
	} {
		_, err := g.Prepare(t.Context(), tc.ref, tc.platform)
		if err == nil || !tc.class(err) {
			t.Errorf("%s %s: %v", tc.ref, tc.platform, err)
			continue
		}
		for _, text := range tc.text {
			if !strings.Contains(err.Error(), text) {
				t.Errorf("%s: %q is not in %v", tc.ref, text, err)
			}
		}
	}
	g.nothingKept(t)
	if left := g.list(t, "layers"); len(left) > 0 {
		t.Errorf("layers left: %v", left)
	}
}

// A caller that leaves does not disturb the others.
func TestCancelOne(t *testing.T) {
	g := newRig(t)
	files := tree{"a": text(1, 1<<20)}
	pushed := g.push("app:v1", files.gzip(t))
	blob := pushed.Layers[0].Digest
	g.reg.Fault(blob.String(), 1, registrytest.Delay(300*time.Millisecond))
	ctx, cancel := context.WithCancel(t.Context())
	first := make(chan error, 1)
	go func() {
		_, err := g.Prepare(ctx, g.ref("app:v1"), "")
		first <- err
	}()
	g.waitForRequest(t, blob)
	second := make(chan error, 1)
	go func() {
		_, err := g.Prepare(t.Context(), g.ref("app:v1"), "")
		second <- err
	}()
	g.waitForCallers(t, "app:v1", 2)
	cancel()
	if err := <-first; !errors.Is(err, context.Canceled) {
		t.Errorf("the one that left: %v", err)
	}
	if err := <-second; err != nil {
		t.Errorf("the one that stayed: %v", err)
	}
	if n := g.reg.BlobStats(blob).Requests; n != 1 {
		t.Errorf("%d requests", n)
	}
	g.check(t, g.lease(t, "app:v1"), 0, files)
}

// When the last caller has left, the work ends and leaves nothing.
func TestCancelAll(t *testing.T) {
	g := newRig(t)
	files := tree{"a": text(1, 1<<20)}
	pushed := g.push("app:v1", files.gzip(t))
	blob := pushed.Layers[0].Digest
	end := g.reg.Fault(blob.String(), 0, registrytest.Slow(10_000))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 2)
	for range 2 {
		go func() {
			_, err := g.Prepare(ctx, g.ref("app:v1"), "")
			done <- err
		}()
	}
	g.waitForRequest(t, blob)
	cancel()
	for range 2 {
		if err := <-done; !errors.Is(err, context.Canceled) {
			t.Errorf("error %v", err)
		}
	}
	g.prepares.wg.Wait()
	g.indexing.wg.Wait()
	g.layers.wg.Wait()
	g.nothingKept(t)
	end()
	g.prepare(t, "app:v1")
	g.check(t, g.lease(t, "app:v1"), 0, files)
}

func (g *rig) waitForRequest(t *testing.T, d digest.Digest) {
	t.Helper()
	for len(g.reg.Requests(d.String())) == 0 {
		time.Sleep(time.Millisecond)
		if t.Context().Err() != nil {
			t.Fatal("no request came")
		}
	}
}

func (g *rig) waitForCallers(t *testing.T, object string, n int) {
	t.Helper()
	for key, have := (target{reference: g.ref(object)}), 0; have < n; time.Sleep(time.Millisecond) {
		g.prepares.mu.Lock()
		if job := g.prepares.jobs[key]; job != nil {
			have = job.callers
		}
		g.prepares.mu.Unlock()
	}
}

// The work of preparing is divided into phases that do not overlap.
func TestPhases(t *testing.T) {
	g := newRig(t)
	g.push("app:v1", tree{"a": "a"}.gzip(t))
	p := g.prepare(t, "app:v1")
	var names []string
	end := time.Duration(0)
	for _, ph := range p.Phases {
		names = append(names, ph.Name)
		if ph.Start < end || ph.Duration < 0 {
			t.Errorf("phase %+v begins before %s", ph, end)
		}
		end = ph.Start + ph.Duration
	}
	if !slices.Equal(names, []string{"resolve", "layers", "bootstrap", "encode", "keep"}) {
		t.Errorf("phases %v", names)
	}
}

// Guests that read a layer as the registry has it cost one download together, also
// when they have got it in different ways.
func TestRawBlobs(t *testing.T) {
	g := newRig(t)
	pushed := g.push("app:v1", tree{"a": text(1, 1<<20)}.gzip(t))
	g.prepare(t, "app:v1")
	desc, before := pushed.Layers[0], g.layerBytes(pushed)
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			if got := object(t, g.lease(t, "app:v1"), kindBlob, desc.Digest); digest.FromBytes(got) != desc.Digest {
				t.Error("wrong bytes")
			}
		})
	}
	wg.Wait()
	if got := g.layerBytes(pushed) - before; got != desc.Size {
		t.Errorf("four guests took %d bytes of a layer of %d from the registry", got, desc.Size)
	}
}

// A mirror with wrong bytes costs a second download of a layer, whoever else reads it.
func TestMirroredWrong(t *testing.T) {
	g := newRig(t)
	g.cfg.Mirrored = true
	pushed := g.push("app:v1", tree{"a": text(1, 1<<20)}.gzip(t))
	bad := registrytest.Start(t, registrytest.Options{})
	layer := tree{"a": text(1, 1<<20)}.gzip(t)
	bad.PushBlob("library/app", layer.MediaType, layer.Blob)
	bad.Fault(pushed.Layers[0].Digest.String(), 0, registrytest.Corrupt(pushed.Layers[0].Size/2))
	list := []*registry.Host{
		{Name: bad.Host(), Scheme: "http", Path: "/v2", Capabilities: registry.CanPull},
		{Name: g.reg.Host(), Scheme: "http", Path: "/v2", Capabilities: registry.CanAll},
	}
	g.cfg.Registry = registry.New(registry.Config{RetryMax: -1, Hosts: func(string) []*registry.Host { return list }})
	defer g.cfg.Registry.Close()
	g.prepare(t, "app:v1")
	if n := bad.BlobStats(pushed.Layers[0].Digest).Bytes; n == 0 {
		t.Error("the mirror was not asked")
	}
}

// With others on the node that read blobs, the download for the index is the only one.
func TestMirrored(t *testing.T) {
	g := newRig(t)
	g.cfg.Mirrored = true
	pushed := g.push("app:v1", tree{"a": text(1, 1<<20)}.gzip(t))
	g.prepare(t, "app:v1")
	desc := pushed.Layers[0]
	if got := object(t, g.lease(t, "app:v1"), kindBlob, desc.Digest); digest.FromBytes(got) != desc.Digest {
		t.Error("wrong bytes")
	}
	if got := g.layerBytes(pushed); got != desc.Size {
		t.Errorf("%d bytes of a layer of %d were sent", got, desc.Size)
	}
}
