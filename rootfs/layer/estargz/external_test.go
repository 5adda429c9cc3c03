package estargz

import (
	"bytes"
	stdgzip "compress/gzip"
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	builder "github.com/containerd/stargz-snapshotter/estargz"
	"github.com/containerd/stargz-snapshotter/estargz/externaltoc"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/tests/layertest"
	"github.com/tatami-containers/tatami/tests/torture"
)

// convertExternal makes a blob without a TOC, and the blob with the TOC.
func convertExternal(tb testing.TB, plain []byte) (b *layertest.Blob, packed []byte, sum digest.Digest) {
	tb.Helper()
	c := externaltoc.NewGzipCompressionWithLevel(nil, stdgzip.BestSpeed).(*externaltoc.GzipCompression)
	b, sum = convert(tb, plain, builder.WithCompression(c), builder.WithChunkSize(50_000))
	var toc bytes.Buffer
	if _, err := c.WriteTOCTo(&toc); err != nil {
		tb.Fatal(err)
	}
	return b, toc.Bytes(), sum
}

func TestOpenExternal(t *testing.T) {
	plain := sample(t, 50)
	b, packed, sum := convertExternal(t, plain)
	if _, err := Open(t.Context(), b, b.Descriptor(nil), sum); !errdefs.IsNotFound(err) || !strings.Contains(err.Error(), "-esgztoc") {
		t.Errorf("opened without its TOC: %v", err)
	}
	l, err := OpenExternal(bytes.NewReader(packed), int64(len(packed)), b.Descriptor(nil), sum)
	if err != nil {
		t.Fatal(err)
	}
	checkLayer(t, l, b, plain, false)
	cases := []struct {
		name   string
		packed []byte
		sum    digest.Digest
		is     func(error) bool
	}{
		{"of another layer", packed, digest.FromString("x"), errdefs.IsDataLoss},
		{"no digest", packed, "", errdefs.IsInvalidArgument},
		{"cut", packed[:len(packed)/2], sum, func(error) bool { return true }},
		{"empty", nil, sum, func(error) bool { return true }},
		{"another file", b.Data, sum, errdefs.IsInvalidArgument},
	}
	for _, c := range cases {
		_, err := OpenExternal(bytes.NewReader(c.packed), int64(len(c.packed)), b.Descriptor(nil), c.sum)
		if err == nil || !c.is(err) || !strings.Contains(err.Error(), b.Descriptor(nil).Digest.String()) {
			t.Errorf("%s: %v", c.name, err)
		}
	}
}

// TestOpenLossless has a blob that unpacks to the very tar, which only a TOC
// elsewhere allows.
func TestOpenLossless(t *testing.T) {
	for i, plain := range torture.Layers() {
		var data, packed bytes.Buffer
		c := externaltoc.NewGzipCompressorWithLevel(stdgzip.BestSpeed)
		w := builder.NewWriterWithCompressor(&data, c)
		if err := w.AppendTarLossLess(bytes.NewReader(plain)); err != nil {
			t.Fatal(err)
		}
		sum, err := w.Close()
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.WriteTOCTo(&packed); err != nil {
			t.Fatal(err)
		}
		b := &layertest.Blob{Data: data.Bytes()}
		l, err := OpenExternal(&packed, int64(packed.Len()), b.Descriptor(nil), sum)
		if err != nil {
			t.Fatalf("layer %d: %v", i, err)
		}
		checkLayer(t, l, b, plain, false)
	}
}

// manifests has manifests by tag.
type manifests map[string][]byte

func (m manifests) GetManifest(_ context.Context, tag string) ([]byte, error) {
	if b, ok := m[tag]; ok {
		return b, nil
	}
	return nil, fmt.Errorf("tag %q: %w", tag, errdefs.ErrNotFound)
}

// tocImage is the manifest that ctr-remote writes for the TOCs of layers.
func tocImage(tb testing.TB, of digest.Digest, toc layer.Descriptor) []byte {
	tb.Helper()
	toc.MediaType = ocispec.MediaTypeImageLayerGzip
	toc.Annotations = map[string]string{"containerd.io/snapshot/stargz/layer.digest": of.String()}
	b, err := json.Marshal(ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest, Layers: []layer.Descriptor{toc}})
	if err != nil {
		tb.Fatal(err)
	}
	return b
}

func TestFindExternal(t *testing.T) {
	annotated := map[string]string{TOCDigest: digest.FromString("json").String()}
	l := layer.Descriptor{Digest: digest.FromString("layer"), Annotations: annotated}
	plain := layer.Descriptor{Digest: digest.FromString("plain")}
	toc := layer.Descriptor{Digest: digest.FromString("toc"), Size: 10}
	cases := []struct {
		name   string
		repo   manifests
		layers []layer.Descriptor
		found  int
		says   string
	}{
		{"found", manifests{"v1-esgztoc": tocImage(t, l.Digest, toc)}, []layer.Descriptor{plain, l}, 1, ""},
		{"of another layer", manifests{"v1-esgztoc": tocImage(t, plain.Digest, toc)}, []layer.Descriptor{plain, l}, 0, ""},
		{"no image", manifests{}, []layer.Descriptor{l}, 0, ""},
		{"no eStargz layers", manifests{"v1-esgztoc": nil}, []layer.Descriptor{plain}, 0, ""},
		{"no manifest", manifests{"v1-esgztoc": []byte("x")}, []layer.Descriptor{l}, 0, "manifest"},
		{"long manifest", manifests{"v1-esgztoc": make([]byte, maxManifest+1)}, []layer.Descriptor{l}, 0, "is over"},
		{"no size", manifests{"v1-esgztoc": tocImage(t, l.Digest, layer.Descriptor{Digest: toc.Digest})}, []layer.Descriptor{l}, 0, "0 bytes"},
		{"no digest", manifests{"v1-esgztoc": tocImage(t, l.Digest, layer.Descriptor{Size: 5})}, []layer.Descriptor{l}, 0, "digest"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			found, err := FindExternal(t.Context(), c.repo, "v1", c.layers)
			if c.says != "" {
				if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), "v1-esgztoc") {
					t.Errorf("error %v, want one that says %q", err, c.says)
				}
				return
			}
			if err != nil || len(found) != c.found || c.found > 0 && found[l.Digest].Digest != toc.Digest {
				t.Errorf("%v, %v", found, err)
			}
		})
	}
}
