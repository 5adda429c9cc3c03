package check

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/artifact"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/tests/kinds"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tools/progress"
	"github.com/tatami-containers/tatami/tools/transport"
)

const repo = "library/x"

func plain(tb testing.TB) []byte {
	tb.Helper()
	t := torture.NewTar()
	t.Dir("etc")
	t.File("etc/motd", "hello", torture.Attr("user.a", "1"))
	t.File("etc/other", "HELLO")
	t.Link("etc/linked", "etc/motd")
	t.Symlink("etc/soft", "motd")
	t.Random("large", 300_000)
	t.File("gone/.wh.x", "")
	t.File("opaque/.wh..wh..opq", "")
	return t.Bytes()
}

// checked checks an image by its name.
func checked(t *testing.T, name string) (*Report, error) {
	t.Helper()
	n, err := transport.Parse(name)
	if err != nil {
		t.Fatal(err)
	}
	client := transport.NewClient(nil)
	defer client.Close()
	src, err := transport.OpenSource(n, transport.Options{Registry: client})
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	sel, err := transport.Select(t.Context(), src, name, nil)
	if err != nil {
		t.Fatal(err)
	}
	return Image(t.Context(), src, sel.Images[0], progress.None, slog.New(slog.DiscardHandler))
}

// problems are all that a report lists.
func (r *Report) problems() []string {
	var out []string
	for _, l := range r.Layers {
		for _, w := range l.Ways {
			for _, p := range w.Problems {
				out = append(out, w.From+": "+p)
			}
		}
	}
	return out
}

func (r *Report) ways() string {
	var out []string
	for _, l := range r.Layers {
		for _, w := range l.Ways {
			out = append(out, w.From)
		}
	}
	return strings.Join(out, " ")
}

// TestGood checks images of each kind.
func TestGood(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	ref := s.Host() + "/" + repo + ":"
	gzip := registrytest.Must(registrytest.Gzip(plain(t)))
	for name, l := range map[string]registrytest.Layer{
		"gzip": gzip, "zstd": kinds.Zstd(plain(t), 100_000), "tar": registrytest.Uncompressed(plain(t)),
		"estargz": registrytest.Must(registrytest.EStargz(plain(t))), "podman": kinds.ZstdChunked(t, plain(t)), "stargz": kinds.ZstdStargz(t, plain(t)),
	} {
		s.PushImage(repo, name, registrytest.Image{Layers: []registrytest.Layer{l}})
	}
	s.PushImage(repo, "twice", registrytest.Image{Layers: []registrytest.Layer{gzip, gzip}})
	kinds.PushExternal(t, s, repo, "external", plain(t))
	kinds.PushSOCI(t, s, repo, "soci1", 1)
	kinds.PushSOCI(t, s, repo, "soci2", 2)
	kinds.PushNydus(t, s, repo, "nydus", "v6-zstd-blake3")
	for tag, ways := range map[string]string{
		"gzip": "built", "zstd": "built", "tar": "built", "twice": "built", "estargz": "built toc", "podman": "built toc", "stargz": "built toc",
		"external": "built toc", "soci1": "built soci built soci built soci", "soci2": "built soci built soci built soci", "nydus": "nydus",
	} {
		r, err := checked(t, ref+tag)
		if err != nil {
			t.Errorf("%s: %v", tag, err)
			continue
		}
		if r.Problems != 0 || r.ways() != ways {
			t.Errorf("%s: ways %q, problems %q", tag, r.ways(), r.problems())
		}
		for _, l := range r.Layers {
			for _, w := range l.Ways {
				if w.Entries == 0 || w.Chunks == 0 || w.Bytes == 0 || w.Compared != (tag != "nydus") {
					t.Errorf("%s: %+v", tag, w)
				}
			}
		}
	}
}

// TestTorture checks what the formats can hold of everything that tars have.
func TestTorture(t *testing.T) {
	for name, pack := range map[string]func([]byte) registrytest.Layer{
		"gzip":    func(b []byte) registrytest.Layer { return registrytest.Must(registrytest.Gzip(b)) },
		"zstd":    func(b []byte) registrytest.Layer { return kinds.Zstd(b, 1<<20) },
		"estargz": func(b []byte) registrytest.Layer { return registrytest.Must(registrytest.EStargz(b)) },
		"podman":  func(b []byte) registrytest.Layer { return kinds.ZstdChunked(t, b) },
	} {
		t.Run(name, func(t *testing.T) {
			s := registrytest.Start(t, registrytest.Options{})
			var layers []registrytest.Layer
			for _, tar := range torture.Layers() {
				if name != "gzip" && name != "zstd" {
					tar = kinds.Text(tar) // tables of contents are JSON
				}
				layers = append(layers, pack(tar))
			}
			s.PushImage(repo, "v1", registrytest.Image{Layers: layers})
			r, err := checked(t, s.Host()+"/"+repo+":v1")
			if err != nil {
				t.Fatal(err)
			}
			got := r.problems()
			if name == "estargz" && len(got) == 1 && strings.Contains(got[0], `"own4": hard link to "own3", which does not exist`) {
				return // its maker puts the second own3 behind the link to the first
			}
			if len(got) != 0 {
				t.Errorf("problems %q", got)
			}
		})
	}
}

// TestForged has indexes that say other things than the layer.
func TestForged(t *testing.T) {
	l := registrytest.Must(registrytest.Gzip(plain(t)))
	desc := layer.Descriptor{Digest: digest.FromBytes(l.Blob), Size: int64(len(l.Blob))}
	for _, c := range []struct {
		name   string
		change func(l *index.Layer, entry func(path string) *index.Entry)
		says   []string
	}{
		{"nothing", func(*index.Layer, func(string) *index.Entry) {}, nil},
		{"mode", func(_ *index.Layer, e func(string) *index.Entry) { e("etc/motd").Mode = 0o4755 }, []string{`"etc/motd" has mode 0644 in the layer, 04755 in the index`}},
		{"owner", func(_ *index.Layer, e func(string) *index.Entry) { e("etc").UID = 7 }, []string{`"etc" belongs to 0:0 in the layer, to 7:0`}},
		{"time", func(_ *index.Layer, e func(string) *index.Entry) { e("etc").Nsec++ }, []string{`"etc" was modified`}},
		{"attribute", func(_ *index.Layer, e func(string) *index.Entry) { e("etc/motd").Xattrs[0].Value = "2" }, []string{`"etc/motd" has other extended attributes`}},
		{"symlink", func(_ *index.Layer, e func(string) *index.Entry) { e("etc/soft").Link = "other" }, []string{`"etc/soft" is a symlink to "motd"`}},
		{"hard link", func(_ *index.Layer, e func(string) *index.Entry) { e("etc/linked").Link = "etc/other" }, []string{`"etc/linked" is a hard link to "etc/motd"`}},
		{"kind", func(_ *index.Layer, e func(string) *index.Entry) { e("etc").Kind = index.Fifo }, []string{`"etc" has type '5' in the layer`}},
		{"content", func(_ *index.Layer, e func(string) *index.Entry) {
			a, b := e("etc/motd"), e("etc/other")
			a.Off, b.Off = b.Off, a.Off
		}, []string{`"etc/motd": its content`, `"etc/other": its content`}},
		{"missing", func(l *index.Layer, _ func(string) *index.Entry) { l.Entries = l.Entries[:len(l.Entries)-1] }, []string{`"opaque/.wh..wh..opq" is in the layer and not in the index`}},
		{"added", func(l *index.Layer, _ func(string) *index.Entry) {
			l.Entries = append(l.Entries, index.Entry{Path: "added", Kind: index.Dir, Mode: 0o755})
		}, []string{`"added" is in the index and not in the layer`}},
		{"chunk", func(l *index.Layer, _ func(string) *index.Entry) { l.Table.Chunks[1].Sum[0]++ }, []string{"has not the digest"}},
		{"skeleton", func(l *index.Layer, _ func(string) *index.Entry) { l.Skeleton[600]++ }, []string{"skeleton and segment make"}},
		{"diffID", func(l *index.Layer, _ func(string) *index.Entry) { l.DiffID = digest.FromString("x") }, []string{"cannot be held against the diffID"}},
		{"many", func(l *index.Layer, _ func(string) *index.Entry) {
			for i := range 50 {
				l.Entries = append(l.Entries, index.Entry{Path: strings.Repeat("x", i+1), Kind: index.Dir})
			}
		}, []string{"not in the layer"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			made, err := layer.Build(t.Context(), bytes.NewReader(l.Blob), desc, layer.Discard, layer.Options{Skeleton: true})
			if err != nil {
				t.Fatal(err)
			}
			c.change(made, func(path string) *index.Entry {
				for i := range made.Entries {
					if made.Entries[i].Path == path {
						return &made.Entries[i]
					}
				}
				t.Fatalf("no %q", path)
				return nil
			})
			s := registrytest.Start(t, registrytest.Options{})
			img := s.PushImage(repo, "v1", registrytest.Image{Layers: []registrytest.Layer{l}})
			data := registrytest.Must(index.EncodeLayer(made))
			file := artifact.LayerFile(desc.Digest, data)
			s.PushBlobAs(repo, file.Digest, data)
			adesc, manifest, err := artifact.New(img.Desc, file)
			if err != nil {
				t.Fatal(err)
			}
			s.PushManifest(repo, "", adesc.MediaType, manifest)
			r, err := checked(t, s.Host()+"/"+repo+":v1")
			if err != nil || r.ways() != "built index" {
				t.Fatalf("%v, %+v", err, r)
			}
			w := r.Layers[0].Ways[1]
			if len(r.Layers[0].Ways[0].Problems) != 0 || (r.Problems == 0) != (c.says == nil) || r.Problems != len(w.Problems)+w.More {
				t.Errorf("%d problems: %q", r.Problems, r.problems())
			}
			for _, says := range c.says {
				if !strings.Contains(strings.Join(w.Problems, "\n"), says) {
					t.Errorf("no %q in %q", says, w.Problems)
				}
			}
			if c.name == "many" && (len(w.Problems) != maxProblems || w.More != 30) {
				t.Errorf("%d problems and %d more", len(w.Problems), w.More)
			}
		})
	}
}

// TestWrongDiffID has a config that is not the layer's.
func TestWrongDiffID(t *testing.T) {
	l := registrytest.Must(registrytest.Gzip(plain(t)))
	l.DiffID = digest.FromString("x")
	s := registrytest.Start(t, registrytest.Options{})
	s.PushImage(repo, "v1", registrytest.Image{Layers: []registrytest.Layer{l}})
	r, err := checked(t, s.Host()+"/"+repo+":v1")
	if err != nil || r.Problems != 2 {
		t.Fatalf("%v, %+v", err, r)
	}
	for i, says := range []string{"built: independent unpack: layer", "built: layer"} { // the node's own reading comes to the same
		if p := r.problems()[i]; !strings.HasPrefix(p, says) || !strings.Contains(p, l.DiffID.String()) {
			t.Errorf("problem %d is %q", i, p)
		}
	}
}

// TestFlipped checks layouts in which one byte of a layer has changed.
func TestFlipped(t *testing.T) {
	for name, l := range map[string]registrytest.Layer{
		"gzip": registrytest.Must(registrytest.Gzip(plain(t))), "podman": kinds.ZstdChunked(t, plain(t)),
	} {
		s := registrytest.Start(t, registrytest.Options{})
		s.PushImage(repo, "v1", registrytest.Image{Layers: []registrytest.Layer{l}})
		dir := t.TempDir()
		copyImage(t, s.Host()+"/"+repo+":v1", "oci:"+dir)
		file := filepath.Join(dir, ocispec.ImageBlobsDir, "sha256", digest.FromBytes(l.Blob).Encoded())
		blob := bytes.Clone(l.Blob)
		blob[len(blob)/3] ^= 1
		if err := os.WriteFile(file, blob, 0o600); err != nil {
			t.Fatal(err)
		}
		r, err := checked(t, "oci:"+dir)
		if err != nil || r.Problems == 0 || r.Layers[0].Blob != digest.FromBytes(l.Blob) {
			t.Errorf("%s: %v, %+v", name, err, r)
		}
	}
}

func copyImage(t *testing.T, from, to string) {
	t.Helper()
	client := transport.NewClient(nil)
	defer client.Close()
	src := registrytest.Must(transport.OpenSource(registrytest.Must(transport.Parse(from)), transport.Options{Registry: client}))
	dst := registrytest.Must(transport.OpenDest(registrytest.Must(transport.Parse(to)), transport.Options{Registry: client}))
	if _, err := transport.Copy(t.Context(), src, dst, transport.CopyOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := dst.Close(); err != nil {
		t.Fatal(err)
	}
}
