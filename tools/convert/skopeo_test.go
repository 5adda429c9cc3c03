package convert_test

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/tools/convert"
)

// registry serves an image of one layer, with requests for several ranges at
// once, which podman's library makes.
type registry struct {
	ref   string
	asked atomic.Int64 // bytes of the layer
	whole atomic.Int64 // requests for all of it
}

func serve(t *testing.T, r result) *registry {
	t.Helper()
	blobs := map[digest.Digest][]byte{}
	put := func(mediaType string, v any) ocispec.Descriptor {
		b, err := json.Marshal(v)
		must(err)
		d := ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b))}
		blobs[d.Digest] = b
		return d
	}
	config := put(ocispec.MediaTypeImageConfig, ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH},
		RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{r.DiffID}}})
	manifest := put(ocispec.MediaTypeImageManifest, ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2},
		MediaType: ocispec.MediaTypeImageManifest, Config: config, Layers: []ocispec.Descriptor{r.Descriptor}})
	blobs[r.Descriptor.Digest] = r.blob
	reg := &registry{}
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v2/{$}", func(http.ResponseWriter, *http.Request) {})
	mux.HandleFunc("GET /v2/x/manifests/{ref}", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", manifest.MediaType)
		_, _ = w.Write(blobs[manifest.Digest]) // the client sees a lost answer
	})
	mux.HandleFunc("GET /v2/x/blobs/{digest}", func(w http.ResponseWriter, req *http.Request) {
		d := digest.Digest(req.PathValue("digest"))
		if d == r.Descriptor.Digest {
			w = &countingWriter{w, &reg.asked}
			if req.Header.Get("Range") == "" {
				reg.whole.Add(1)
			}
		}
		w.Header().Set("Content-Type", "application/octet-stream")
		http.ServeContent(w, req, "", time.Time{}, bytes.NewReader(blobs[d]))
	})
	server := httptest.NewServer(mux)
	t.Cleanup(server.Close)
	reg.ref = "docker://" + server.Listener.Addr().String() + "/x:latest"
	return reg
}

type countingWriter struct {
	http.ResponseWriter
	n *atomic.Int64
}

func (w *countingWriter) Write(p []byte) (int, error) {
	w.n.Add(int64(len(p)))
	return w.ResponseWriter.Write(p)
}

// TestSkopeo copies images with the system's skopeo, which checks digests, and
// has it decompress the layer.
func TestSkopeo(t *testing.T) {
	for name, f := range formats {
		t.Run(name, func(t *testing.T) {
			r := layer(t, base(), convert.Options{Format: f})
			ref := serve(t, r).ref
			layout, dir := t.TempDir(), t.TempDir()
			tool(t, nil, "skopeo", "copy", "-q", "--src-tls-verify=false", "--insecure-policy", ref, "oci:"+layout+":x")
			got, err := os.ReadFile(filepath.Join(layout, "blobs", "sha256", r.Descriptor.Digest.Encoded()))
			if err != nil || !bytes.Equal(got, r.blob) {
				t.Errorf("layer is not in the layout as it was, %v", err)
			}
			tool(t, nil, "skopeo", "copy", "-q", "--insecure-policy", "--dest-decompress", "oci:"+layout+":x", "dir:"+dir)
			if _, err := os.Stat(filepath.Join(dir, r.DiffID.Encoded())); err != nil {
				t.Error(err)
			}
		})
	}
}

// TestSkopeoPartial has podman's library pull a zstd:chunked layer by its TOC,
// and compares the files with the source. That of Debian 12 forgets times and
// does not decode JSON's escapes.
func TestSkopeoPartial(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("containers/storage needs root for overlay")
	}
	source := without(base(), func(h *tar.Header) bool { // more than ext4 takes, and what podman does not
		return strings.ContainsAny(h.Name, "\\\t\n\x01") || strings.HasPrefix(h.Name, "attr/large") || h.Name == "attr/link-attr" ||
			h.ModTime.Unix() < 0 || h.Typeflag == tar.TypeLink && !strings.HasPrefix(h.Name, "big/")
	})
	r := layer(t, source, convert.Options{Format: convert.ZstdChunked})
	for k, v := range r.Descriptor.Annotations { // as the key was in skopeo 1.9, of Debian 12
		r.Descriptor.Annotations[strings.Replace(k, "io.github.", "io.", 1)] = v
	}
	reg := serve(t, r)
	dir := t.TempDir()
	conf := filepath.Join(dir, "storage.conf")
	must(os.WriteFile(conf, fmt.Appendf(nil, `[storage]
driver = "overlay"
graphroot = "%[1]s/root"
runroot = "%[1]s/run"
[storage.options]
pull_options = {enable_partial_images = "true", use_hard_links = "false", ostree_repos = ""}
`, dir), 0o600))
	t.Setenv("CONTAINERS_STORAGE_CONF", conf)
	t.Cleanup(func() { _ = unix.Unmount(filepath.Join(dir, "root", "overlay"), unix.MNT_DETACH) })
	tool(t, nil, "skopeo", "copy", "-q", "--src-tls-verify=false", "--insecure-policy", reg.ref, "containers-storage:x:latest")
	if n := reg.asked.Load(); reg.whole.Load() > 0 || n == 0 {
		t.Errorf("the layer was asked for as a whole: %d bytes of %d", n, r.Descriptor.Size)
	}
	trees, err := filepath.Glob(filepath.Join(dir, "root/overlay/*/diff"))
	if err != nil || len(trees) != 1 {
		t.Fatal(trees, err)
	}
	files := 0
	walk(source, func(h *tar.Header, data []byte) {
		if h.Typeflag != tar.TypeReg {
			return
		}
		files++
		name := filepath.Join(trees[0], h.Name)
		got, err := os.ReadFile(name)
		if err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s has other content, %v", h.Name, err)
		}
		if fi, err := os.Stat(name); err != nil || fi.Mode() != h.FileInfo().Mode() {
			t.Errorf("%s is %v, %v", h.Name, fi, err)
		}
	})
	if files < 1000 {
		t.Errorf("only %d files", files)
	}
}
