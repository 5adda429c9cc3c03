package formats_test

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/artifact"
	"github.com/tatami-containers/tatami/rootfs/formats"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/tests/kinds"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

const repo = "library/x"

// plain is a layer of some files.
func plain(t *testing.T) []byte {
	t.Helper()
	return registrytest.Must(registrytest.Tar(
		registrytest.Dir("etc", 0o755), registrytest.File("etc/motd", 0o644, "hello"),
		registrytest.File("large", 0o600, strings.Repeat("some words\n", 40_000)),
	))
}

// found is a finder of an image and what it logged.
type found struct {
	*formats.Finder
	img *image.Image
	log *bytes.Buffer
}

// find resolves a tag by the real client.
func find(t *testing.T, s *registrytest.Server, tag string) found {
	t.Helper()
	client := registry.New(registry.Config{})
	t.Cleanup(func() { _ = client.Close() }) // never fails
	ref, err := image.ParseReference(s.Host() + "/" + repo + ":" + tag)
	if err != nil {
		t.Fatal(err)
	}
	r := client.Repository(ref)
	img, err := image.Resolve(t.Context(), r, ref, ocispec.Platform{OS: "linux", Architecture: "amd64"})
	if err != nil {
		t.Fatal(err)
	}
	var log bytes.Buffer
	blob := func(d ocispec.Descriptor) layer.Blob { return r.LayerBlob(d) }
	return found{formats.New(r, blob, img, slog.New(slog.NewTextHandler(&log, nil))), img, &log}
}

// layers are those of the finder; the test fails if it has none.
func (f found) layers(t *testing.T) []formats.Layer {
	t.Helper()
	out, err := f.Layers()
	if err != nil || len(out) == 0 {
		t.Fatalf("%d layers, %v", len(out), err)
	}
	return out
}

// ways are the kinds of ways to a layer; "!" marks those that are bound.
func (f found) ways(l formats.Layer) string {
	var out []string
	for _, w := range f.Ways(l) {
		from := w.From
		if w.Bound {
			from += "!"
		}
		out = append(out, from)
	}
	return strings.Join(out, " ")
}

// built is the index that a node would make of a layer's blob.
func built(t *testing.T, blob []byte, span int64) *index.Layer {
	t.Helper()
	l, err := layer.Build(t.Context(), bytes.NewReader(blob), layer.Descriptor{Digest: digest.FromBytes(blob), Size: int64(len(blob))},
		layer.Discard, layer.Options{Skeleton: true, Span: span})
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// pushArtifact pushes an artifact with the index l as that of the blob.
func pushArtifact(t *testing.T, s *registrytest.Server, subject ocispec.Descriptor, blob digest.Digest, l *index.Layer, list bool) ocispec.Descriptor {
	t.Helper()
	data := registrytest.Must(index.EncodeLayer(l))
	file := artifact.LayerFile(blob, data)
	s.PushBlobAs(repo, file.Digest, data)
	desc, manifest, err := artifact.New(subject, file)
	if err != nil {
		t.Fatal(err)
	}
	if list {
		s.PushManifest(repo, "", desc.MediaType, manifest)
	} else {
		s.PushUnlisted(repo, desc.MediaType, manifest)
	}
	return desc
}

var amd64 = ocispec.Platform{OS: "linux", Architecture: "amd64"}

func push(s *registrytest.Server, tag string, layers ...registrytest.Layer) registrytest.Pushed {
	return s.PushImage(repo, tag, registrytest.Image{Layers: layers, Platform: amd64})
}

// TestKinds finds the ways that the layers of each kind of image have by
// themselves, and opens all of them.
func TestKinds(t *testing.T) {
	gzip := registrytest.Must(registrytest.Gzip(plain(t)))
	one := func(l registrytest.Layer) func(*testing.T, *registrytest.Server) {
		return func(_ *testing.T, s *registrytest.Server) { push(s, "v1", l) }
	}
	for _, c := range []struct {
		name   string
		push   func(*testing.T, *registrytest.Server)
		before string // Discover
		after  string
		layers int
		whole  bool // can be streamed
	}{
		{"gzip", one(gzip), "", "", 1, true},
		{"tar", one(registrytest.Uncompressed(plain(t))), "", "", 1, true},
		{"zstd", one(kinds.Zstd(plain(t), 0)), "", "", 1, true},
		{"estargz", one(registrytest.Must(registrytest.EStargz(plain(t)))), "toc!", "toc!", 1, true},
		{"estargz external", func(t *testing.T, s *registrytest.Server) {
			kinds.PushExternal(t, s, repo, "v1", plain(t))
		}, "toc!", "toc!", 1, true},
		{"zstdchunked", one(kinds.ZstdChunked(t, plain(t))), "toc!", "toc!", 1, true},
		{"zstdchunked of stargz", one(kinds.ZstdStargz(t, plain(t))), "toc!", "toc!", 1, true},
		{"SOCI v1", func(t *testing.T, s *registrytest.Server) { kinds.PushSOCI(t, s, repo, "v1", 1) }, "", "soci", 3, true},
		{"SOCI v2", func(t *testing.T, s *registrytest.Server) { kinds.PushSOCI(t, s, repo, "v1", 2) }, "", "soci!", 3, true},
		{"Nydus v5", func(t *testing.T, s *registrytest.Server) {
			kinds.PushNydus(t, s, repo, "v1", "v5-lz4-sha256")
		}, "nydus!", "nydus!", 1, false},
		{"Nydus v6", func(t *testing.T, s *registrytest.Server) {
			kinds.PushNydus(t, s, repo, "v1", "v6-merge")
		}, "nydus!", "nydus!", 1, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := registrytest.Start(t, registrytest.Options{})
			c.push(t, s)
			f := find(t, s, "v1")
			layers := f.layers(t)
			if len(layers) != c.layers || layers[0].Whole != c.whole {
				t.Errorf("%d layers, whole %v", len(layers), layers[0].Whole)
			}
			for _, l := range layers {
				if got := f.ways(l); got != c.before {
					t.Errorf("before Discover: %q", got)
				}
			}
			f.Discover(t.Context(), true)
			for _, l := range layers {
				if got := f.ways(l); got != c.after {
					t.Errorf("ways %q, want %q", got, c.after)
				}
				f.open(t, s, l)
			}
			if f.log.Len() > 0 {
				t.Errorf("logged %s", f.log)
			}
		})
	}
}

// open opens all ways to a layer and holds what they say they fetched against
// what the registry has sent.
func (f found) open(t *testing.T, s *registrytest.Server, l formats.Layer) {
	t.Helper()
	for _, w := range f.Ways(l) {
		s.Reset()
		made, fetched, err := w.Open(t.Context())
		if err != nil {
			t.Fatalf("%s: %v", w.From, err)
		}
		if len(made.Entries) == 0 || made.Validate() != nil || l.Check(made) != nil {
			t.Errorf("%s: %d entries, %v, %v", w.From, len(made.Entries), made.Validate(), l.Check(made))
		}
		sent := int64(0)
		for _, r := range s.Requests("/blobs/") {
			sent += s.BlobStats(digest.Digest(r.Path[strings.LastIndex(r.Path, "/")+1:])).Bytes
		}
		if n := len(s.Requests("/blobs/")); n == 1 && fetched != sent || fetched == 0 {
			t.Errorf("%s: fetched %d bytes, the registry sent %d", w.From, fetched, sent)
		}
		if w.By.Validate() != nil {
			t.Errorf("%s: by %q", w.From, w.By)
		}
	}
}

// TestExternalCounts counts the bytes of a TOC outside of the blob, too.
func TestExternalCounts(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	kinds.PushExternal(t, s, repo, "v1", plain(t))
	f := find(t, s, "v1")
	toc, l := find(t, s, "v1-esgztoc").img.Layers[0], f.layers(t)[0]
	_, fetched, err := f.Ways(l)[0].Open(t.Context())
	if sent := s.BlobStats(l.Digest).Bytes + toc.Size; err != nil || fetched != sent || s.BlobStats(toc.Digest).Bytes != toc.Size {
		t.Errorf("fetched %d bytes, the registry sent %d: %v", fetched, sent, err)
	}
}

// TestArtifacts has an eStargz layer, to which a TOC always leads, with
// artifacts bound and beside it.
func TestArtifacts(t *testing.T) {
	l := registrytest.Must(registrytest.EStargz(plain(t)))
	blob := digest.FromBytes(l.Blob)
	good := built(t, l.Blob, 0)
	for _, c := range []struct {
		name      string
		opts      registrytest.Options
		bound     bool // an artifact is bound
		beside    bool // and listed as a referrer
		other     bool // another one is beside
		look      bool // Discover looks beside
		want      string
		artifacts int
	}{
		{"none", registrytest.Options{}, false, false, false, true, "toc!", 0},
		{"bound", registrytest.Options{}, true, false, false, true, "index! toc!", 1},
		{"referrer", registrytest.Options{}, false, true, false, true, "toc! index", 1},
		{"referrer that is not looked for", registrytest.Options{}, false, true, false, false, "toc!", 0},
		{"bound and referrer", registrytest.Options{}, true, true, false, true, "index! toc!", 1},
		{"bound and another referrer", registrytest.Options{}, true, true, true, true, "index! toc! index", 2},
		{"no referrers API", registrytest.Options{NoReferrers: true}, false, true, false, true, "toc! index", 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := registrytest.Start(t, c.opts)
			img := push(s, "v1", l)
			size := int64(0)
			if c.bound || c.beside {
				desc := pushArtifact(t, s, img.Desc, blob, good, c.beside)
				if c.look || c.bound {
					size += desc.Size
				}
				if c.bound {
					s.PushIndex(repo, "v1", false, img.Desc, artifact.Bind(desc, img.Desc.Digest))
				}
			}
			if c.other {
				size += pushArtifact(t, s, img.Desc, blob, built(t, l.Blob, 1<<10), true).Size
			}
			f := find(t, s, "v1")
			f.Discover(t.Context(), c.look)
			if got := f.ways(f.layers(t)[0]); got != c.want || len(f.Artifacts) != c.artifacts {
				t.Errorf("ways %q, %d artifacts", got, len(f.Artifacts))
			}
			if f.Fetched != size || f.log.Len() > 0 {
				t.Errorf("fetched %d bytes of manifests, want %d; logged %s", f.Fetched, size, f.log)
			}
			for _, w := range f.Ways(f.layers(t)[0]) {
				made, fetched, err := w.Open(t.Context())
				if err != nil || w.From == formats.FromIndex && (fetched != s.BlobStats(w.By).Bytes || len(made.Entries) != len(good.Entries)) {
					t.Errorf("%s: fetched %d bytes: %v", w.From, fetched, err)
				}
			}
		})
	}
}

// TestNotBeside asks nothing about referrers if told so.
func TestNotBeside(t *testing.T) {
	for version, want := range map[int]string{1: "", 2: "soci!"} {
		s := registrytest.Start(t, registrytest.Options{})
		kinds.PushSOCI(t, s, repo, "v1", version)
		f := find(t, s, "v1")
		f.Discover(t.Context(), false)
		if got := f.ways(f.layers(t)[0]); got != want || len(s.Requests("/referrers/")) > 0 {
			t.Errorf("SOCI v%d: ways %q, %d requests", version, got, len(s.Requests("/referrers/")))
		}
	}
}

// TestWrongArtifacts has artifacts that must not be used.
func TestWrongArtifacts(t *testing.T) {
	l, other := registrytest.Must(registrytest.Gzip(plain(t))), registrytest.Must(registrytest.Gzip(make([]byte, 10240)))
	wrong := built(t, l.Blob, 0)
	wrong.Blob = digest.FromBytes(other.Blob)
	blob := digest.FromBytes(l.Blob)
	far := built(t, l.Blob, 0)
	for i := range far.Access.Extents {
		far.Access.Extents[i].Tar += 33 << 20
	}
	for _, c := range []struct {
		name string
		made *index.Layer
		is   func(error) bool
		says string
	}{
		{"of another blob", wrong, errdefs.IsInvalidArgument, digest.FromBytes(other.Blob).String()},
		{"of another size", func() *index.Layer { m := built(t, l.Blob, 0); m.BlobSize++; return m }(), errdefs.IsInvalidArgument, "bytes"},
		{"without random access", far, errdefs.IsFailedPrecondition, "too few places"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := registrytest.Start(t, registrytest.Options{})
			img := push(s, "v1", l)
			pushArtifact(t, s, img.Desc, blob, c.made, true)
			f := find(t, s, "v1")
			f.Discover(t.Context(), true)
			ways := f.Ways(f.layers(t)[0])
			if len(ways) != 1 {
				t.Fatalf("%d ways", len(ways))
			}
			made, _, err := ways[0].Open(t.Context())
			if made != nil || !c.is(err) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), blob.String()) {
				t.Errorf("%v", err)
			}
		})
	}
	t.Run("of another subject", func(t *testing.T) {
		s := registrytest.Start(t, registrytest.Options{})
		img, second := push(s, "v1", l), push(s, "v2", other)
		desc := pushArtifact(t, s, second.Desc, blob, built(t, l.Blob, 0), false)
		s.PushIndex(repo, "v1", false, img.Desc, artifact.Bind(desc, img.Desc.Digest))
		f := find(t, s, "v1")
		f.Discover(t.Context(), true)
		if got := f.ways(f.layers(t)[0]); got != "" || !strings.Contains(f.log.String(), "is not of manifest") {
			t.Errorf("ways %q, logged %s", got, f.log)
		}
	})
}

// TestFailingRegistry passes over what cannot be had.
func TestFailingRegistry(t *testing.T) {
	l := registrytest.Must(registrytest.EStargz(plain(t)))
	s := registrytest.Start(t, registrytest.Options{})
	img := push(s, "v1", l)
	good := built(t, l.Blob, 0)
	bound := pushArtifact(t, s, img.Desc, digest.FromBytes(l.Blob), good, false)
	pushArtifact(t, s, img.Desc, digest.FromBytes(l.Blob), built(t, l.Blob, 1<<10), true)
	s.PushIndex(repo, "v1", false, img.Desc, artifact.Bind(bound, img.Desc.Digest))
	for _, c := range []struct{ path, ways string }{
		{"/referrers/", "index! toc!"},
		{"/manifests/" + bound.Digest.String(), "toc! index"},
	} {
		f := find(t, s, "v1")
		end := s.Fault(c.path, 0, registrytest.Status(403))
		f.Discover(t.Context(), true)
		end()
		if got := f.ways(f.layers(t)[0]); got != c.ways || !strings.Contains(f.log.String(), img.Desc.Digest.String()) {
			t.Errorf("%s: ways %q, logged %s", c.path, got, f.log)
		}
	}
}

// TestManyReferrers reads only some of them.
func TestManyReferrers(t *testing.T) {
	l := registrytest.Must(registrytest.EStargz(plain(t)))
	s := registrytest.Start(t, registrytest.Options{})
	img := push(s, "v1", l)
	for i := range 6 {
		made := built(t, l.Blob, 0)
		made.Prefetch = []index.Range{{Off: 0, Len: int64(i + 1)}}
		pushArtifact(t, s, img.Desc, digest.FromBytes(l.Blob), made, true)
	}
	f := find(t, s, "v1")
	f.Discover(t.Context(), true)
	if len(f.Artifacts) != 4 {
		t.Errorf("%d artifacts are read", len(f.Artifacts))
	}
}

func TestLayersRefused(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	push(s, "v1", registrytest.Layer{Blob: []byte("x"), MediaType: "application/x-odd", DiffID: digest.FromString("x")})
	if _, err := find(t, s, "v1").Layers(); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), digest.FromString("x").String()) {
		t.Errorf("%v", err)
	}
}

func TestCheck(t *testing.T) {
	a, b := digest.FromString("a"), digest.FromString("b")
	for _, c := range []struct {
		config, made digest.Digest
		ok           bool
	}{{a, a, true}, {a, b, false}, {"", b, true}, {a, "", true}} {
		l := formats.Layer{Layer: image.Layer{DiffID: c.config}}
		if err := l.Check(&index.Layer{DiffID: c.made}); (err == nil) != c.ok || !c.ok && !errdefs.IsDataLoss(err) {
			t.Errorf("%q, %q: %v", c.config, c.made, err)
		}
	}
}
