package cli

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/tests/kinds"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tools/check"
	"github.com/tatami-containers/tatami/tools/inspect"
	"github.com/tatami-containers/tatami/tools/transport"
)

// invoke runs a command without progress.
func invoke(t *testing.T, args ...string) (code int, out, errs string) {
	t.Helper()
	var o, e bytes.Buffer
	args = append([]string{args[0], "--quiet"}, args[1:]...)
	code = Main(t.Context(), args, Streams{In: strings.NewReader(""), Out: &o, Err: &e})
	return code, o.String(), e.String()
}

// good runs a command that must succeed.
func good(t *testing.T, args ...string) string {
	t.Helper()
	code, out, errs := invoke(t, args...)
	if code != 0 || errs != "" {
		t.Fatalf("%q: exit code %d\n%s", args, code, errs)
	}
	return out
}

// parsed runs a command with JSON output.
func parsed[T any](t *testing.T, args ...string) T {
	t.Helper()
	var v T
	d := json.NewDecoder(strings.NewReader(good(t, append([]string{args[0], "-o", "json"}, args[1:]...)...)))
	d.DisallowUnknownFields()
	if err := d.Decode(&v); err != nil {
		t.Fatalf("%q: %v", args, err)
	}
	return v
}

func plain(name string) []byte {
	t := torture.NewTar()
	t.File(name, "hello")
	t.Random("large", 200_000)
	return t.Bytes()
}

// places are a registry with an image for two platforms under the tag multi
// and one of a single platform under single, and a layout with the first.
func places(t *testing.T) (reg, layout string) {
	t.Helper()
	s := registrytest.Start(t, registrytest.Options{})
	var list []ocispec.Descriptor
	for _, arch := range []string{"amd64", "arm64"} {
		img := s.PushImage("x", "single", registrytest.Image{
			Layers:   []registrytest.Layer{registrytest.Must(registrytest.Gzip(plain(arch)))},
			Platform: ocispec.Platform{OS: "linux", Architecture: arch},
		})
		list = append(list, img.Desc)
	}
	s.PushIndex("x", "multi", false, list...)
	reg, layout = s.Host()+"/x", "oci:"+filepath.Join(t.TempDir(), "layout")
	client := transport.NewClient(nil)
	defer client.Close()
	src := registrytest.Must(transport.OpenSource(registrytest.Must(transport.Parse(reg+":multi")), transport.Options{Registry: client}))
	dst := registrytest.Must(transport.OpenDest(registrytest.Must(transport.Parse(layout+":multi")), transport.Options{}))
	registrytest.Must(transport.Copy(t.Context(), src, dst, transport.CopyOptions{}))
	if err := dst.Close(); err != nil {
		t.Fatal(err)
	}
	return reg, layout
}

func TestImageUsage(t *testing.T) {
	reg, layout := places(t)
	profile := filepath.Join(t.TempDir(), "profile")
	if err := os.WriteFile(profile, []byte("../x\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	byDigest := reg + "@" + string(parsed[[]inspect.Report](t, "inspect", reg+":single")[0].Manifest)
	for _, c := range []struct {
		args []string
		says string
	}{
		{[]string{"inspect"}, "see `tatami inspect -h`"},
		{[]string{"check", "a", "b"}, "see `tatami check -h`"},
		{[]string{"index", "a", "b", "c"}, "see `tatami index -h`"},
		{[]string{"convert", "--to", "estargz", "a"}, "see `tatami convert -h`"},
		{[]string{"convert", "a", "b"}, "want estargz, zstdchunked"},
		{[]string{"convert", "--to", "rpm", "a", "b"}, `"rpm": want estargz`},
		{[]string{"inspect", "-o", "xml", "a"}, "want text or json"},
		{[]string{"inspect", "--fly", "a"}, "fly"},
		{[]string{"inspect", "oci:"}, "write oci:PATH"},
		{[]string{"inspect", "--platform", "moon", reg + ":multi"}, "moon"},
		{[]string{"inspect", "--platform", "linux/s390x", reg + ":multi"}, `"linux/arm64"`},
		{[]string{"check", layout + ":none"}, `no image is called "none"; there is: "multi"`},
		{[]string{"index", "--bind", byDigest}, "name a tag"},
		{[]string{"convert", "--to", "estargz", reg + ":single", byDigest}, "name a tag"},
		{[]string{"index", "--profile", profile, reg + ":single"}, "line 1"},
		{[]string{"convert", "--to", "estargz", "--level", "30", reg + ":single", reg + ":other"}, "between 1 and 9"},
		{[]string{"convert", "--to", "zstdchunked", "--pack", "1000", reg + ":single", reg + ":other"}, "leave pack at 0"},
	} {
		code, out, errs := invoke(t, c.args...)
		if code != exitFailed || out != "" || !strings.Contains(errs, c.says) || !strings.Contains(errs, "tatami "+c.args[0]+": ") {
			t.Errorf("%q: exit code %d\n%s%s", c.args, code, out, errs)
		}
	}
	if code, _, errs := invoke(t, "convert", "-h"); code != 0 || !strings.Contains(errs, "docker-archive:FILE") || !strings.Contains(errs, "-chunk-size") {
		t.Errorf("convert -h: exit code %d\n%s", code, errs)
	}
}

// TestInspect tells of all platforms, or of one.
func TestInspect(t *testing.T) {
	reg, layout := places(t)
	for _, name := range []string{reg + ":multi", layout + ":multi", layout} {
		all := parsed[[]inspect.Report](t, "inspect", name)
		if len(all) != 2 || all[0].Platform != "linux/amd64" || all[1].Platform != "linux/arm64" || all[0].Parent == "" || all[0].Lazy {
			t.Errorf("%s: %+v", name, all)
		}
		one := parsed[[]inspect.Report](t, "inspect", "--platform", "linux/arm64", "--build", name)
		if len(one) != 1 || one[0].Manifest != all[1].Manifest || one[0].Layers[0].From != "built" {
			t.Errorf("%s: %+v", name, one)
		}
		out := good(t, "inspect", name)
		if !strings.Contains(out, "linux/arm64 "+string(all[1].Manifest)) || !strings.Contains(out, "a node reads the layer whole once") || !strings.Contains(out, "of image index "+string(all[0].Parent)) {
			t.Errorf("%s:\n%s", name, out)
		}
	}
}

// TestIndex publishes indexes beside images and bound.
func TestIndex(t *testing.T) {
	reg, layout := places(t)
	profile := filepath.Join(t.TempDir(), "profile")
	if err := os.WriteFile(profile, []byte("/large\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{reg + ":multi", layout + ":multi"} {
		made := parsed[[]indexed](t, "index", "--profile", profile, name)
		if len(made) != 2 || made[1].Platform != "linux/arm64" || made[0].Artifact == made[1].Artifact || made[0].Index == 0 || made[0].Image < 200_000 {
			t.Errorf("%s: %+v", name, made)
		}
		found := parsed[[]inspect.Report](t, "inspect", name)
		if a := found[0].Artifacts; len(a) != 1 || a[0].Digest != made[0].Artifact || a[0].Bound || !found[0].Lazy || found[0].Layers[0].Index.Prefetch != 200_000 {
			t.Errorf("%s: %+v", name, found[0])
		}
		again := good(t, "index", "--profile", profile, "--bind", name)
		if !strings.Contains(again, "index "+string(made[0].Artifact)) || !strings.Contains(again, "linux/amd64") {
			t.Errorf("%s: the same index is another one the second time:\n%s", name, again)
		}
		found = parsed[[]inspect.Report](t, "inspect", name)
		if len(found) != 2 || len(found[1].Artifacts) != 1 || found[1].Artifacts[0] != (inspect.Artifact{Digest: made[1].Artifact, Bound: true, Size: made[1].Index}) {
			t.Errorf("%s: bound: %+v", name, found)
		}
		if out := good(t, "inspect", "--platform", "linux/amd64", name); !strings.Contains(out, string(made[0].Artifact)+", bound") {
			t.Errorf("%s:\n%s", name, out)
		}
	}
	copied := reg + ":copied"
	if made := parsed[[]indexed](t, "index", "--bind", reg+":single", copied); len(made) != 1 {
		t.Errorf("%+v", made)
	}
	if found := parsed[[]inspect.Report](t, "inspect", copied); len(found) != 1 || !found[0].Artifacts[0].Bound {
		t.Errorf("%+v", found)
	}
	if found := parsed[[]inspect.Report](t, "inspect", reg+":single"); found[0].Parent != "" {
		t.Errorf("the source was changed: %+v", found)
	}
}

// TestIndexUnfit indexes the images of an index that can be, and tells why the
// others cannot.
func TestIndexUnfit(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	large := torture.NewTar()
	large.File("large", strings.Repeat("\x01", 33<<20)) // too much for one frame
	push := func(arch string, l registrytest.Layer) ocispec.Descriptor {
		return s.PushImage("x", arch, registrytest.Image{
			Layers: []registrytest.Layer{l}, Platform: ocispec.Platform{OS: "linux", Architecture: arch},
		}).Desc
	}
	frame := push("amd64", kinds.Zstd(large.Bytes(), 0))
	nydus := kinds.PushNydus(t, s, "x", "nydus", "v6-merge").Desc
	nydus.Platform = &ocispec.Platform{OS: "linux", Architecture: "riscv64"}
	fit := push("arm64", registrytest.Must(registrytest.Gzip(plain("arm64"))))
	s.PushIndex("x", "some", false, frame, nydus, fit)
	s.PushIndex("x", "none", false, frame, nydus)
	name := s.Host() + "/x:some"
	made := parsed[[]indexed](t, "index", "--bind", name)
	if len(made) != 3 || made[2].Error != "" || made[2].Artifact == "" {
		t.Fatalf("%+v", made)
	}
	for i, says := range []string{"tatami convert", "not supported"} {
		if r := made[i]; !strings.Contains(r.Error, says) || r.Artifact != "" || r.Index != 0 {
			t.Errorf("image %d: %+v", i, r)
		}
	}
	found := parsed[[]inspect.Report](t, "inspect", name)
	if len(found) != 3 || len(found[0].Artifacts) != 0 || len(found[2].Artifacts) != 1 || !found[2].Artifacts[0].Bound {
		t.Errorf("%+v", found)
	}
	if out := good(t, "index", name); strings.Count(out, "  not indexed: ") != 2 || !strings.Contains(out, "index "+string(made[2].Artifact)) {
		t.Errorf("%s", out)
	}
	code, out, errs := invoke(t, "index", "--bind", s.Host()+"/x:none")
	if code != exitFailed || out != "" || !strings.Contains(errs, "tatami convert") || !strings.Contains(errs, "not supported") {
		t.Errorf("none: exit code %d\n%s%s", code, out, errs)
	}
	// A registry that refuses a request says nothing about the image.
	blob := registrytest.Must(registrytest.Gzip(plain("arm64"))).Blob
	s.Fault("/blobs/"+digest.FromBytes(blob).String(), 0, registrytest.Status(400))
	s.PushIndex("x", "refused", false, fit, push("s390x", registrytest.Must(registrytest.Gzip(plain("s390x")))))
	if code, out, _ := invoke(t, "index", s.Host()+"/x:refused"); code != exitFailed || out != "" {
		t.Errorf("refused: exit code %d\n%s", code, out)
	}
}

// TestConvert converts an index whole, and one platform of it.
func TestConvert(t *testing.T) {
	reg, layout := places(t)
	profile := filepath.Join(t.TempDir(), "profile")
	if err := os.WriteFile(profile, []byte("large\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		flags, way string // of the first layer
		images     int    // that were converted
	}{
		{"--to=estargz", "toc", 2},
		{"--to=zstdchunked", "toc", 2},
		{"--to=zstdchunked-stargz", "toc", 2},
		{"--to=tatami", "index", 0},
		{"--to=tatami --profile=" + profile, "index", 2},
		{"--to=estargz --platform=linux/arm64", "toc", 1},
	} {
		for i, to := range []string{reg + ":converted", layout + "2:converted"} {
			from := []string{reg, layout}[i] + ":multi"
			made := parsed[converted](t, append(append([]string{"convert"}, strings.Fields(c.flags)...), from, to)...)
			if len(made.Images) != c.images || (len(made.Indexes) == 2) != (c.way == "index") {
				t.Errorf("%s: %+v", c.flags, made)
			}
			found := parsed[[]inspect.Report](t, "inspect", to)
			want := 2
			if c.images == 1 {
				want = 1
			}
			if len(found) != want || found[want-1].Platform != "linux/arm64" || found[0].Layers[0].From != c.way || !found[0].Lazy {
				t.Errorf("%s: %+v", c.flags, found)
			}
			for i, r := range made.Images {
				if r.Manifest != found[i].Manifest || r.After != found[i].Compressed {
					t.Errorf("%s: %+v", c.flags, r)
				}
			}
			if out := good(t, "check", to); strings.Count(out, "  good\n") != want {
				t.Errorf("%s:\n%s", c.flags, out)
			}
		}
	}
	if out := good(t, "convert", "--to", "estargz", reg+":single", reg+":other"); !strings.Contains(out, "of tar in") {
		t.Errorf("%s", out)
	}
}

// TestConvertVariants keeps what only the index says: its annotations, and the
// variants of its platforms.
func TestConvertVariants(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	index := ocispec.Index{MediaType: ocispec.MediaTypeImageIndex, Annotations: map[string]string{"org.example.kept": "yes"}}
	index.SchemaVersion = 2
	want := []string{"linux/arm/v6", "linux/arm/v7"}
	for _, v := range want {
		arm := ocispec.Platform{OS: "linux", Architecture: "arm"}
		d := s.PushImage("x", "", registrytest.Image{
			Layers: []registrytest.Layer{registrytest.Must(registrytest.Gzip(plain(filepath.Base(v))))}, Platform: arm,
		}).Desc
		arm.Variant = filepath.Base(v)
		d.Platform = &arm
		index.Manifests = append(index.Manifests, d)
	}
	s.PushManifest("x", "arm", index.MediaType, registrytest.Must(json.Marshal(index)))
	to := "oci:" + filepath.Join(t.TempDir(), "layout") + ":arm"
	good(t, "convert", "--to", "estargz", s.Host()+"/x:arm", to)
	src := registrytest.Must(transport.OpenSource(registrytest.Must(transport.Parse(to)), transport.Options{}))
	defer src.Close()
	got := registrytest.Must(transport.Select(t.Context(), src, to, nil)).Index
	if got == nil || got.Annotations["org.example.kept"] != "yes" || len(got.Manifests) != len(want) {
		t.Fatalf("%+v", got)
	}
	checked, inspected := parsed[[]check.Report](t, "check", to), parsed[[]inspect.Report](t, "inspect", to)
	for i, platform := range want {
		if p := image.FormatPlatform(*got.Manifests[i].Platform); p != platform {
			t.Errorf("manifest %d is for %s, want %s", i, p, platform)
		}
		if checked[i].Platform != platform || inspected[i].Platform != platform {
			t.Errorf("reported as %s and %s, want %s", checked[i].Platform, inspected[i].Platform, platform)
		}
	}
}

// TestCheck tells by its exit code whether there are problems.
func TestCheck(t *testing.T) {
	_, layout := places(t)
	all := parsed[[]check.Report](t, "check", layout)
	if len(all) != 2 || all[0].Problems != 0 {
		t.Errorf("%+v", all)
	}
	blob := all[1].Layers[0].Blob
	file := filepath.Join(strings.TrimPrefix(layout, "oci:"), "blobs/sha256", blob.Encoded())
	data := registrytest.Must(os.ReadFile(file))
	data[len(data)/2] ^= 1
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	code, out, errs := invoke(t, "check", layout)
	if code != exitProblems || errs != "" || strings.Count(out, "  good\n") != 1 || !strings.Contains(out, "1 problems") || !strings.Contains(out, blob.Encoded()[:12]) {
		t.Errorf("exit code %d\n%s%s", code, out, errs)
	}
	code, out, _ = invoke(t, "check", "-o", "json", "--platform", "linux/arm64", layout)
	if err := json.Unmarshal([]byte(out), &all); err != nil || code != exitProblems || len(all) != 1 || all[0].Problems != 1 {
		t.Errorf("exit code %d, %v\n%s", code, err, out)
	}
}

// TestFormats inspects and checks images of other makers.
func TestFormats(t *testing.T) {
	s := registrytest.Start(t, registrytest.Options{})
	kinds.PushSOCI(t, s, "x", "soci", 2)
	kinds.PushNydus(t, s, "x", "nydus", "v6-merge")
	for _, c := range []struct{ tag, says string }{
		{"soci", "soci, bound"}, {"nydus", "blobs are read as 1 layer"},
	} {
		name := s.Host() + "/x:" + c.tag
		if out := good(t, "inspect", name); !strings.Contains(out, c.says) {
			t.Errorf("%s:\n%s", c.tag, out)
		}
		if out := good(t, "check", name); !strings.Contains(out, "  good\n") {
			t.Errorf("%s:\n%s", c.tag, out)
		}
	}
	code, _, errs := invoke(t, "index", s.Host()+"/x:nydus")
	if code != exitFailed || !strings.Contains(errs, "not supported") {
		t.Errorf("index of a Nydus image: exit code %d\n%s", code, errs)
	}
}
