package zstdchunked

import (
	"archive/tar"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/stargz-snapshotter/estargz"
	builder "github.com/containerd/stargz-snapshotter/estargz/zstdchunked"
	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/layer/toc"
	"github.com/tatami-containers/tatami/tests/layertest"
	"github.com/tatami-containers/tatami/tests/torture"
)

// small is the layer that the blobs in testdata were made of (see README.md
// there). It has what their dialects have, in a few kilobytes.
func small() []byte {
	t := torture.NewTar()
	t.Dir(".", torture.Mode(0o711))
	t.Dir("d", torture.Own(7, 70_000), torture.Attr("user.dir", "\x00\xff"))
	t.Random("split-243", 3000, torture.Mode(0o4755), torture.Attr("user.file", "x"))
	t.File("d/holes", "head"+strings.Repeat("\x00", 5000)+"middle"+strings.Repeat("\x00", 70_000))
	t.File("d/zeros", strings.Repeat("\x00", 9000))
	t.File("d/empty", "", torture.At(-1, 999_999_999))
	t.Link("hard", "d/holes")
	t.Symlink("soft", "../d/./holes")
	t.Device(tar.TypeChar, "null", 1, 3)
	t.Device(tar.TypeFifo, "pipe", 0, 0)
	t.File("d/.wh.gone", "")
	t.File("e/.wh..wh..opq", "")
	t.File("e/stargz.index.json", "not a TOC")
	return t.Bytes()
}

// stargz converts a layer with stargz-snapshotter's library.
func stargz(tb testing.TB, plain []byte, opts ...estargz.Option) (*layertest.Blob, map[string]string) {
	tb.Helper()
	annotations := map[string]string{}
	opts = append(opts, estargz.WithCompression(struct {
		*builder.Decompressor
		*builder.Compressor
	}{new(builder.Decompressor), &builder.Compressor{CompressionLevel: zstd.SpeedDefault, Metadata: annotations}}))
	made, err := estargz.Build(io.NewSectionReader(bytes.NewReader(plain), 0, int64(len(plain))), opts...)
	if err != nil {
		tb.Fatal(err)
	}
	data, err := io.ReadAll(made)
	if err := errors.Join(err, made.Close()); err != nil {
		tb.Fatal(err)
	}
	annotations[estargz.TOCJSONDigestAnnotation] = made.TOCDigest().String()
	return &layertest.Blob{Data: data}, annotations
}

// recorded is a blob in testdata, of the layer small.
func recorded(tb testing.TB, name string) (*layertest.Blob, map[string]string) {
	tb.Helper()
	data, err := os.ReadFile(filepath.Join("testdata", name+".zst"))
	if err != nil {
		tb.Fatal(err)
	}
	b, err := os.ReadFile(filepath.Join("testdata", name+".json"))
	if err != nil {
		tb.Fatal(err)
	}
	var annotations map[string]string
	if err := json.Unmarshal(b, &annotations); err != nil {
		tb.Fatal(err)
	}
	return &layertest.Blob{Data: data}, annotations
}

var recordings = []string{"podman", "skopeo-1.9"}

// check compares all of a layer with the tar that it was made of.
func check(t *testing.T, b *layertest.Blob, annotations map[string]string, plain []byte, limits layertest.Limits) *index.Layer {
	t.Helper()
	b.Requests.Store(0)
	l, err := Open(t.Context(), b, b.Descriptor(annotations))
	if err != nil {
		t.Fatal(err)
	}
	if b.Requests.Load() != 1 {
		t.Errorf("%d requests", b.Requests.Load())
	}
	layertest.SameEntries(t, l, plain, limits)
	r := layer.NewReader(l, layer.OneBlob(b))
	seg := layertest.Segment(t, l, func(off, n int64) (io.ReadCloser, error) { return r.Open(t.Context(), off, n) })
	layertest.SameContent(t, l, seg, plain)
	return l
}

func TestOpenStargz(t *testing.T) {
	for i, plain := range torture.Layers() {
		for name, opts := range map[string][]estargz.Option{
			"default": nil,
			"small":   {estargz.WithChunkSize(10_000)},
			"inner":   {estargz.WithChunkSize(30_000), estargz.WithMinChunkSize(100_000)},
		} {
			t.Run(fmt.Sprint(i, " ", name), func(t *testing.T) {
				b, annotations := stargz(t, plain, opts...)
				l := check(t, b, annotations, plain, layertest.Limits{Seconds: true, Last: true})
				inner := slices.ContainsFunc(l.Access.Pieces, func(p index.Piece) bool { return p.Inner > 0 })
				if inner != (name == "inner") {
					t.Errorf("pieces with inner offsets: %v", inner)
				}
			})
		}
	}
}

func TestStargzPrefetch(t *testing.T) {
	b, annotations := stargz(t, small(), estargz.WithPrioritizedFiles([]string{"d/zeros"}))
	l := check(t, b, annotations, small(), layertest.Limits{Seconds: true, Last: true, Order: true})
	if want := []index.Range{{Len: index.RoundUp(9000)}}; !slices.Equal(l.Prefetch, want) {
		t.Errorf("prefetch %v, want %v", l.Prefetch, want)
	}
}

// TestOpenFooter has a blob of which the manifest does not say where the TOC is.
func TestOpenFooter(t *testing.T) {
	b, annotations := stargz(t, small())
	want, err := Open(t.Context(), b, b.Descriptor(annotations))
	if err != nil {
		t.Fatal(err)
	}
	b.Requests.Store(0)
	l, err := Open(t.Context(), b, b.Descriptor(map[string]string{stargzDigest: annotations[stargzDigest]}))
	if err != nil || fmt.Sprint(l) != fmt.Sprint(want) || b.Requests.Load() != 2 {
		t.Errorf("%v, %v, %d requests", l, err, b.Requests.Load())
	}
	// Where the manifest does say, the footer is nothing.
	clear(b.Data[len(b.Data)-footerSize:])
	if _, err := Open(t.Context(), b, b.Descriptor(annotations)); err != nil {
		t.Error(err)
	}
}

// TestOpenPodman reads blobs that podman's library and an old skopeo made.
func TestOpenPodman(t *testing.T) {
	plain := small()
	for _, name := range recordings {
		t.Run(name, func(t *testing.T) {
			b, annotations := recorded(t, name)
			z, err := zstd.NewReader(bytes.NewReader(b.Data))
			if err != nil {
				t.Fatal(err)
			}
			defer z.Close()
			if got, err := io.ReadAll(z); err != nil || !bytes.Equal(got, plain) {
				t.Fatalf("the blob is of another layer, make it again: %v", err)
			}
			l := check(t, b, annotations, plain, layertest.Limits{})
			// Three chunks of split-243, two with data of d/holes, the zeros that
			// are not marked, and the last file.
			if len(l.Table.Chunks) != 7 {
				t.Errorf("%d chunks", len(l.Table.Chunks))
			}
		})
	}
}

func TestTOC(t *testing.T) {
	sum, other := digest.FromString("x"), digest.FromString("y")
	at := "100:50:200:1"
	cases := []struct {
		name        string
		annotations map[string]string
		want        digest.Digest
	}{
		{"podman", map[string]string{podmanChecksum: string(sum), podmanPosition: at}, sum},
		{"podman, TOC of the layer it was converted from", map[string]string{podmanChecksum: string(sum), podmanPosition: at, stargzDigest: string(other)}, sum},
		{"old podman", map[string]string{oldChecksum: string(sum), oldPosition: at}, sum},
		{"stargz", map[string]string{oldChecksum: string(other), oldPosition: at, stargzDigest: string(sum)}, sum},
		{"stargz without position", map[string]string{stargzDigest: string(sum)}, sum},
		{"two blobs", map[string]string{podmanChecksum: string(sum), podmanPosition: at, oldChecksum: string(sum), oldPosition: at}, ""},
		{"none", map[string]string{podmanPosition: at}, ""},
		{"podman without position", map[string]string{podmanChecksum: string(sum)}, ""},
		{"no digest", map[string]string{stargzDigest: "sha256:0"}, ""},
		{"three numbers", map[string]string{podmanChecksum: string(sum), podmanPosition: "100:50:200"}, ""},
		{"negative", map[string]string{podmanChecksum: string(sum), podmanPosition: "-100:50:200:1"}, ""},
		{"huge", map[string]string{podmanChecksum: string(sum), podmanPosition: "9223372036854775808:50:200:1"}, ""},
		{"no number", map[string]string{podmanChecksum: string(sum), podmanPosition: "100:a:200:1"}, ""},
		{"before its frame", map[string]string{podmanChecksum: string(sum), podmanPosition: "7:50:200:1"}, ""},
		{"empty", map[string]string{podmanChecksum: string(sum), podmanPosition: "100:0:200:1"}, ""},
		{"large", map[string]string{podmanChecksum: string(sum), podmanPosition: "100:268435457:268435457:1"}, ""},
		{"bomb", map[string]string{podmanChecksum: string(sum), podmanPosition: "100:50:100000000:1"}, ""},
		{"type", map[string]string{podmanChecksum: string(sum), podmanPosition: "100:50:200:2"}, ""},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			if got, ok := TOC(c.annotations); got != c.want || ok != (c.want != "") {
				t.Errorf("%q, %v", got, ok)
			}
			if c.want != "" {
				return
			}
			b := &layertest.Blob{Data: make([]byte, 1000)}
			_, err := Open(t.Context(), b, b.Descriptor(c.annotations))
			if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), b.Descriptor(nil).Digest.String()) || b.Requests.Load() != 0 {
				t.Errorf("error %v, %d requests", err, b.Requests.Load())
			}
		})
	}
}

func TestOpenErrors(t *testing.T) {
	podman, podmanSays := recorded(t, "podman")
	stargz, stargzSays := stargz(t, small())
	with := func(m map[string]string, key, value string) map[string]string {
		m = maps.Clone(m)
		m[key] = value
		return m
	}
	broken := func(b *layertest.Blob, position string) *layertest.Blob {
		at, err := parsePosition(position)
		if err != nil {
			t.Fatal(err)
		}
		data := bytes.Clone(b.Data)
		data[at.off+at.len/2] ^= 1
		return &layertest.Blob{Data: data}
	}
	footerless := map[string]string{stargzDigest: stargzSays[stargzDigest]}
	cut := &layertest.Blob{Data: stargz.Data[:len(stargz.Data)-1]}
	cases := []struct {
		name        string
		b           *layertest.Blob
		annotations map[string]string
		is          func(error) bool
		says        string
	}{
		{"podman's is another", podman, with(podmanSays, podmanChecksum, digest.FromString("x").String()), errdefs.IsDataLoss, "does not have the digest"},
		{"podman's is broken", broken(podman, podmanSays[podmanPosition]), podmanSays, errdefs.IsDataLoss, "does not have the digest"},
		{"podman's is elsewhere", podman, with(podmanSays, podmanPosition, "100000:5:10:1"), errdefs.IsInvalidArgument, "at byte 100000"},
		{"podman's is longer", podman, longer(t, podmanSays, podmanPosition), errdefs.IsInvalidArgument, "that it should"},
		{"stargz's is another", stargz, with(stargzSays, stargzDigest, digest.FromString("x").String()), errdefs.IsDataLoss, "does not have the digest"},
		{"stargz's is broken", broken(stargz, stargzSays[oldPosition]), stargzSays, errdefs.IsDataLoss, ""},
		{"stargz's is longer", stargz, longer(t, stargzSays, oldPosition), errdefs.IsDataLoss, "that it should"},
		{"no footer", cut, footerless, errdefs.IsInvalidArgument, "no zstd:chunked footer"},
		{"short", &layertest.Blob{Data: []byte("x")}, footerless, errdefs.IsInvalidArgument, "no zstd:chunked footer"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			_, err := Open(t.Context(), c.b, c.b.Descriptor(c.annotations))
			if !c.is(err) || !strings.Contains(err.Error(), c.says) || !strings.Contains(err.Error(), c.b.Descriptor(nil).Digest.String()) {
				t.Errorf("error %v, want one that says %q", err, c.says)
			}
		})
	}
}

// longer says that the TOC has a byte more than it has.
func longer(t *testing.T, annotations map[string]string, key string) map[string]string {
	t.Helper()
	at, err := parsePosition(annotations[key])
	if err != nil {
		t.Fatal(err)
	}
	annotations = maps.Clone(annotations)
	annotations[key] = fmt.Sprintf("%d:%d:%d:1", at.off, at.len, at.plain+1)
	return annotations
}

// pack makes a blob of nothing but a compressed TOC, bound as podman does.
func pack(packed []byte, plain int) (*layertest.Blob, map[string]string) {
	data := append(make([]byte, 1000), packed...)
	return &layertest.Blob{Data: data}, map[string]string{
		podmanChecksum: digest.FromBytes(packed).String(),
		podmanPosition: fmt.Sprintf("1000:%d:%d:1", len(packed), plain),
	}
}

// TestOpenBomb has TOCs that would take much memory: one that is longer than it
// says, and one whose frame has a large window.
func TestOpenBomb(t *testing.T) {
	for name, option := range map[string]zstd.EOption{"long": zstd.WithWindowSize(1 << 20), "window": zstd.WithWindowSize(2 * maxWindow)} {
		var packed bytes.Buffer
		z, err := zstd.NewWriter(&packed, option)
		if err != nil {
			t.Fatal(err)
		}
		for range 64 {
			if _, err := z.Write(bytes.Repeat([]byte(" "), 1<<20)); err != nil {
				t.Fatal(err)
			}
		}
		if err := z.Close(); err != nil {
			t.Fatal(err)
		}
		b, annotations := pack(packed.Bytes(), 1000)
		if _, err := Open(t.Context(), b, b.Descriptor(annotations)); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "TOC") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func FuzzOpen(f *testing.F) {
	for _, name := range recordings {
		b, annotations := recorded(f, name)
		a, err := findAnchor(annotations)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b.Data[a.at.off:][:a.at.len], int(a.at.plain))
	}
	b, annotations := stargz(f, small(), estargz.WithMinChunkSize(2000))
	at, err := parsePosition(annotations[oldPosition])
	if err != nil {
		f.Fatal(err)
	}
	f.Add(b.Data[at.off:][:at.len], int(at.plain))
	f.Fuzz(func(t *testing.T, packed []byte, plain int) {
		b, annotations := pack(packed, plain)
		l, err := Open(t.Context(), b, b.Descriptor(annotations))
		if err == nil {
			err = l.Validate()
		}
		if err != nil && !errdefs.IsInvalidArgument(err) {
			t.Fatalf("error of another class: %v", err)
		}
	})
}

func FuzzAnchor(f *testing.F) {
	f.Add("sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855", "100:50:200:1", []byte{})
	b, annotations := stargz(f, small())
	f.Add(annotations[oldChecksum], annotations[oldPosition], b.Data[len(b.Data)-footerSize:])
	f.Fuzz(func(t *testing.T, sum, pos string, footer []byte) {
		if a, err := findAnchor(map[string]string{podmanChecksum: sum, podmanPosition: pos}); err == nil {
			checkPosition(t, a.at)
		}
		if at, err := parseFooter(footer); err == nil {
			checkPosition(t, at)
		}
	})
}

func checkPosition(t *testing.T, p position) {
	t.Helper()
	if p.off < frameHeader || p.len <= 0 || p.len > toc.MaxSize || p.plain <= 0 || p.plain > toc.MaxSize {
		t.Fatalf("position %+v", p)
	}
}
