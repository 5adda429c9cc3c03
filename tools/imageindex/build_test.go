package imageindex

import (
	"bytes"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/tests/kinds"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tools/transport"
)

const repo = "library/x"

func files(names ...string) []byte {
	var entries []registrytest.Entry
	for _, name := range names {
		entries = append(entries, registrytest.File(name, 0o644, strings.Repeat(name+"\n", 3000)))
	}
	return registrytest.Must(registrytest.Tar(entries...))
}

// open opens an image by its name.
func open(t *testing.T, name string) (transport.Source, *image.Image) {
	t.Helper()
	n, err := transport.Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	client := transport.NewClient(nil)
	src, err := transport.OpenSource(n, transport.Options{Registry: client})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = src.Close(), client.Close() }) // nothing was written
	sel, err := transport.Select(t.Context(), src, name, nil)
	if err != nil {
		t.Fatal(err)
	}
	return src, sel.Images[0]
}

func TestBuild(t *testing.T) {
	a, b := registrytest.Must(registrytest.Gzip(files("a", "b"))), kinds.Zstd(files("c"), 10_000)
	empty := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar())))
	s := registrytest.Start(t, registrytest.Options{})
	s.PushImage(repo, "v1", registrytest.Image{Layers: []registrytest.Layer{a, empty, b, a, empty}})
	src, img := open(t, s.Host()+"/"+repo+":v1")
	var before []File
	for _, parallel := range []int{1, 4} {
		got, err := Build(t.Context(), src, img, Options{Parallel: parallel, Profile: []string{"b", "c"}})
		if err != nil {
			t.Fatal(err)
		}
		for i := range before {
			if !bytes.Equal(got[i].Data, before[i].Data) {
				t.Errorf("file %d is another one the second time", i)
			}
		}
		before = got
	}
	if len(before) != 3 {
		t.Fatalf("%d files for 3 distinct layers", len(before))
	}
	for i, want := range []registrytest.Layer{a, empty, b} {
		l, err := index.DecodeLayer(before[i].Data)
		if err != nil {
			t.Fatal(err)
		}
		if l.Blob != digest.FromBytes(want.Blob) || l.DiffID != want.DiffID || len(l.Skeleton) == 0 {
			t.Errorf("file %d is of blob %s, diffID %s, skeleton of %d bytes", i, l.Blob, l.DiffID, len(l.Skeleton))
		}
		if before[i].Desc.Digest != digest.FromBytes(before[i].Data) || (len(l.Prefetch) == 1) != (i != 1) {
			t.Errorf("file %d: digest %s, prefetch %v", i, before[i].Desc.Digest, l.Prefetch)
		}
	}
}

// TestRandomAccess leaves out layers of one large frame.
func TestRandomAccess(t *testing.T) {
	large := registrytest.Must(registrytest.Tar(registrytest.File("large", 0o644, strings.Repeat("\x01", 33<<20))))
	one, many, small := kinds.Zstd(large, 0), kinds.Zstd(large, 4<<20), kinds.Zstd(files("a"), 0)
	s := registrytest.Start(t, registrytest.Options{})
	for _, c := range []struct {
		name   string
		layers []registrytest.Layer
		kept   []registrytest.Layer
	}{
		{"kept", []registrytest.Layer{small, many}, []registrytest.Layer{small, many}},
		{"some", []registrytest.Layer{one, small}, []registrytest.Layer{small}},
		{"none", []registrytest.Layer{one, one}, nil},
		{"empty", nil, nil},
	} {
		s.PushImage(repo, c.name, registrytest.Image{Layers: c.layers})
		src, img := open(t, s.Host()+"/"+repo+":"+c.name)
		got, err := Build(t.Context(), src, img, Options{})
		if refused := c.kept == nil && c.layers != nil; refused != errdefs.IsFailedPrecondition(err) || !refused && err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if err != nil && !strings.Contains(err.Error(), "tatami convert") {
			t.Errorf("%s: no remedy in %v", c.name, err)
		}
		if len(got) != len(c.kept) {
			t.Fatalf("%s: %d files", c.name, len(got))
		}
		for i, l := range c.kept {
			if of := got[i].Desc.Annotations["vnd.tatami.index.layer"]; of != digest.FromBytes(l.Blob).String() {
				t.Errorf("%s: file %d is of %s", c.name, i, of)
			}
		}
	}
}

func TestBuildRefuses(t *testing.T) {
	wrong := registrytest.Must(registrytest.Gzip(files("a")))
	wrong.DiffID = digest.FromString("another")
	broken := registrytest.Must(registrytest.Gzip([]byte(strings.Repeat("no tar", 1000))))
	s := registrytest.Start(t, registrytest.Options{})
	s.PushImage(repo, "wrong", registrytest.Image{Layers: []registrytest.Layer{wrong}})
	s.PushImage(repo, "broken", registrytest.Image{Layers: []registrytest.Layer{broken}})
	kinds.PushNydus(t, s, repo, "nydus", "v6-tiny")
	for _, c := range []struct {
		tag string
		is  func(error) bool
	}{{"wrong", errdefs.IsDataLoss}, {"broken", errdefs.IsInvalidArgument}, {"nydus", errdefs.IsInvalidArgument}} {
		src, img := open(t, s.Host()+"/"+repo+":"+c.tag)
		got, err := Build(t.Context(), src, img, Options{})
		if got != nil || !c.is(err) || !strings.Contains(err.Error(), img.Layers[0].Digest.String()) {
			t.Errorf("%s: %d files, %v", c.tag, len(got), err)
		}
	}
}

func TestPrefetch(t *testing.T) {
	const block = 4096
	entries := []index.Entry{
		{Path: "a", Kind: index.File, Size: 100, Off: 0},
		{Path: "b", Kind: index.File, Size: 5000, Off: block},
		{Path: "dir", Kind: index.Dir},
		{Path: "empty", Kind: index.File},
		{Path: "c", Kind: index.File, Size: 10, Off: 3 * block},
		{Path: "a", Kind: index.File, Size: 50, Off: 4 * block},
	}
	for _, c := range []struct {
		profile []string
		want    []index.Range
	}{
		{nil, nil},
		{[]string{"none", "dir", "empty"}, nil},
		{[]string{"b", "c", "a"}, []index.Range{{Off: block, Len: 3*block + 50}}},
		{[]string{"c", "b"}, []index.Range{{Off: 3 * block, Len: 10}, {Off: block, Len: 5000}}},
		{[]string{"b", "none", "b", "a", "b"}, []index.Range{{Off: block, Len: 5000}, {Off: 4 * block, Len: 50}}},
	} {
		if got := prefetch(entries, c.profile); !slices.Equal(got, c.want) {
			t.Errorf("%q: %v, want %v", c.profile, got, c.want)
		}
	}
}

func TestReadProfile(t *testing.T) {
	for _, c := range []struct {
		text string
		want []string
		says string
	}{
		{"", nil, ""},
		{"/usr/bin/x\n\n # note\n  ./etc//y \r\n", []string{"usr/bin/x", "etc/y"}, ""},
		{"a\n../b\n", nil, "line 2"},
		{strings.Repeat("x", 70_000), nil, "too long"},
	} {
		name := filepath.Join(t.TempDir(), "profile")
		if err := os.WriteFile(name, []byte(c.text), 0o600); err != nil {
			t.Fatal(err)
		}
		got, err := ReadProfile(name)
		if c.says == "" && (err != nil || !slices.Equal(got, c.want)) {
			t.Errorf("%.40q: %q, %v", c.text, got, err)
		}
		if c.says != "" && (got != nil || !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), name)) {
			t.Errorf("%.40q: %d paths, %v", c.text, len(got), err)
		}
	}
	if _, err := ReadProfile(filepath.Join(t.TempDir(), "none")); !os.IsNotExist(err) && !strings.Contains(err.Error(), "none") {
		t.Errorf("no file: %v", err)
	}
}
