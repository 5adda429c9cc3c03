package inspect

import (
	"bytes"
	"log/slog"
	"strings"
	"testing"

	"github.com/tatami-containers/tatami/tests/kinds"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tools/imageindex"
	"github.com/tatami-containers/tatami/tools/transport"
)

const repo = "library/x"

func plain() []byte {
	t := torture.NewTar()
	t.File("a", "hello")
	t.Random("large", 300_000)
	return t.Bytes()
}

func inspected(t *testing.T, s *registrytest.Server, tag string, build bool) (*Report, string) {
	t.Helper()
	name := s.Host() + "/" + repo + ":" + tag
	src, sel := selected(t, name)
	var log bytes.Buffer
	r, err := Image(t.Context(), src, sel.Images[0], Options{Build: build, Log: slog.New(slog.NewTextHandler(&log, nil))})
	if err != nil {
		t.Fatal(err)
	}
	return r, log.String()
}

func selected(t *testing.T, name string) (transport.Source, *transport.Selection) {
	t.Helper()
	client := transport.NewClient(nil)
	t.Cleanup(func() { _ = client.Close() }) // never fails
	src := registrytest.Must(transport.OpenSource(registrytest.Must(transport.Parse(name)), transport.Options{Registry: client}))
	return src, registrytest.Must(transport.Select(t.Context(), src, name, nil))
}

func TestImage(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	gzip := registrytest.Must(registrytest.Gzip(plain()))
	for name, l := range map[string]registrytest.Layer{
		"gzip": gzip, "estargz": registrytest.Must(registrytest.EStargz(plain())), "podman": kinds.ZstdChunked(t, plain()),
	} {
		s.PushImage(repo, name, registrytest.Image{Layers: []registrytest.Layer{l}})
	}
	kinds.PushSOCI(t, s, repo, "soci", 2)
	kinds.PushNydus(t, s, repo, "nydus", "v6-lz4-sha256")
	for _, c := range []struct {
		tag, from, format, sums string
		build, lazy, diffID     bool
	}{
		{"gzip", "", "", "", false, false, false},
		{"gzip", "built", "gzip", "sha256", true, false, false},
		{"estargz", "toc", "chunked", "sha256", false, true, false},
		{"podman", "toc", "chunked", "sha256", false, true, false},
		{"soci", "soci", "gzip", "spans", false, true, false},
		{"nydus", "nydus", "chunked", "sha256", false, true, false},
	} {
		r, log := inspected(t, s, c.tag, c.build)
		l := r.Layers[0]
		if l.From != c.from || r.Lazy != c.lazy || l.Error != "" || log != "" {
			t.Errorf("%s: from %q, lazy %v, error %q, log %s", c.tag, l.From, r.Lazy, l.Error, log)
		}
		if (l.Index == nil) != (c.from == "") {
			t.Fatalf("%s: index %+v", c.tag, l.Index)
		}
		if i := l.Index; i != nil && (i.Format != c.format || i.Sums != c.sums || i.DiffID != c.diffID || i.Entries == 0 ||
			i.Chunks == 0 || i.Plain < i.Largest || i.Largest == 0 || i.Fetched == 0) {
			t.Errorf("%s: index %+v", c.tag, i)
		}
		if r.Compressed == 0 || len(r.Blobs) == 0 || (r.Unique == 0) != (c.from == "") {
			t.Errorf("%s: %+v", c.tag, r)
		}
	}
}

// TestSums counts chunks that are there twice once.
func TestSums(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	l := registrytest.Must(registrytest.EStargz(plain()))
	s.PushImage(repo, "v1", registrytest.Image{Layers: []registrytest.Layer{l, l}})
	r, _ := inspected(t, s, "v1", false)
	if r.Plain != 2*r.Unique || r.Unique != r.Layers[0].Index.Plain || r.Chunks != 2*r.Layers[0].Index.Chunks {
		t.Errorf("%+v", r)
	}
}

// TestWaysThatFail passes over them and says why there is no index.
func TestWaysThatFail(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	bad := registrytest.Must(registrytest.EStargz(plain()))
	bad.Blob = registrytest.Must(registrytest.Gzip(plain())).Blob
	s.PushImage(repo, "v1", registrytest.Image{Layers: []registrytest.Layer{bad}})
	r, log := inspected(t, s, "v1", false)
	if l := r.Layers[0]; l.Index != nil || !strings.Contains(l.Error, "footer") || len(l.Ways) != 1 || r.Lazy || !strings.Contains(log, "footer") {
		t.Errorf("%+v, log %s", r, log)
	}
	if r, _ := inspected(t, s, "v1", true); r.Layers[0].From != "built" || r.Layers[0].Error != "" || r.Lazy {
		t.Errorf("%+v", r)
	}
}

// TestArtifacts lists what was published.
func TestArtifacts(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	s.PushImage(repo, "v1", registrytest.Image{Layers: []registrytest.Layer{registrytest.Must(registrytest.Gzip(plain()))}})
	name := s.Host() + "/" + repo + ":v1"
	src, sel := selected(t, name)
	files := registrytest.Must(imageindex.Build(t.Context(), src, sel.Images[0], imageindex.Options{Profile: []string{"large"}}))
	client := transport.NewClient(nil)
	defer client.Close()
	dst := registrytest.Must(transport.OpenDest(registrytest.Must(transport.Parse(name)), transport.Options{Registry: client}))
	desc := registrytest.Must(imageindex.Publish(t.Context(), dst, sel.Images[0], files))
	r, _ := inspected(t, s, "v1", false)
	if len(r.Artifacts) != 1 || r.Artifacts[0] != (Artifact{desc.Digest, false, files[0].Desc.Size}) {
		t.Errorf("artifacts %+v", r.Artifacts)
	}
	i := r.Layers[0].Index
	if r.Layers[0].From != "index" || !r.Lazy || i.Fetched != files[0].Desc.Size || i.Prefetch != 300_000 || !i.DiffID {
		t.Errorf("%+v %+v", r.Layers[0], i)
	}
	if w := r.Layers[0].Ways[0]; w != (Way{"index", files[0].Desc.Digest, false}) || w.By.Validate() != nil {
		t.Errorf("way %+v", w)
	}
}
