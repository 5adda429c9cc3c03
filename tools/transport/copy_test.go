package transport_test

import (
	"bytes"
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tools/progress"
	"github.com/tatami-containers/tatami/tools/transport"
)

const artifact = "application/x.artifact"

// multi is a registry with a multi-arch image library/x:v1, one of whose
// manifests has a referrer that has one itself.
type multi struct {
	*registrytest.Server
	index     ocispec.Descriptor
	manifests []ocispec.Descriptor
	layers    []registrytest.Layer
}

func startMulti(t *testing.T, opts registrytest.Options) multi {
	t.Helper()
	m := multi{Server: registrytest.Start(t, opts)}
	shared := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar(registrytest.File("shared", 0o644, "shared")))))
	for _, arch := range []string{"amd64", "arm64"} {
		own := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar(registrytest.File(arch, 0o644, strings.Repeat(arch, 100_000))))))
		m.layers = append(m.layers, own)
		img := m.PushImage("library/x", "", registrytest.Image{
			Platform: ocispec.Platform{OS: "linux", Architecture: arch}, Layers: []registrytest.Layer{shared, own, shared},
		})
		m.manifests = append(m.manifests, img.Desc)
	}
	blob := m.PushBlob("library/x", artifact, []byte("about the first"))
	ref := m.PushReferrer("library/x", m.manifests[0], artifact, blob)
	m.PushReferrer("library/x", ref, artifact, blob)
	m.index = m.PushIndex("library/x", "v1", false, m.manifests...)
	m.Reset()
	return m
}

// jobs notes what Copy reports.
type jobs struct {
	mu    sync.Mutex
	bytes int64
	notes []string
}

func (j *jobs) Start(string, int64) progress.Job { return j }

func (j *jobs) Add(n int64) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.bytes += n
}

func (j *jobs) Done(note string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.notes = append(j.notes, note)
}

func (j *jobs) count(note string) (n int) {
	for _, have := range j.notes {
		if have == note {
			n++
		}
	}
	return n
}

// TestCopy copies everything to each place and back to a registry.
func TestCopy(t *testing.T) {
	all := places(t)
	all["oci-archive"] = "oci-archive:" + filepath.Join(t.TempDir(), "x.tar")
	for kind, place := range all {
		t.Run(kind, func(t *testing.T) {
			m := startMulti(t, registrytest.Options{})
			c := client(t)
			src := source(t, c, m.Host()+"/library/x:v1")
			for round := range 2 {
				d := dest(t, c, place+":v2")
				var j jobs
				got, err := transport.Copy(t.Context(), src, d, transport.CopyOptions{Referrers: true, Progress: &j})
				if err != nil || got.Digest != m.index.Digest {
					t.Fatalf("copied %+v, %v", got, err)
				}
				if err := d.Close(); err != nil {
					t.Fatal(err)
				}
				const blobs = 1 + 2 + 2 + 2 // shared and own layers, configs, artifact and its config
				if len(j.notes) != blobs {
					t.Errorf("%d jobs", len(j.notes))
				}
				if there := j.count("is there already"); kind != "oci-archive" && there != round*blobs {
					t.Errorf("round %d: %d blobs were there", round, there)
				}
			}
			back := registrytest.Start(t, registrytest.Options{})
			d := dest(t, c, back.Host()+"/library/y:v3")
			if _, err := transport.Copy(t.Context(), source(t, c, place+":v2"), d, transport.CopyOptions{Referrers: true}); err != nil {
				t.Fatal(err)
			}
			checkMulti(t, m, source(t, c, back.Host()+"/library/y:v3"))
		})
	}
}

func checkMulti(t *testing.T, m multi, s transport.Source) {
	t.Helper()
	ctx := t.Context()
	top, data, err := s.GetManifest(ctx, "")
	if err != nil || top.Digest != m.index.Digest || digest.FromBytes(data) != m.index.Digest {
		t.Fatalf("index %+v, %v", top, err)
	}
	for i, arch := range []string{"amd64", "arm64"} {
		img, err := transport.Resolve(ctx, s, arch, ocispec.Platform{OS: "linux", Architecture: arch})
		if err != nil || img.Desc.Digest != m.manifests[i].Digest {
			t.Fatalf("%s: %v", arch, err)
		}
		rc, err := s.Open(ctx, img.Layers[1].Descriptor)
		if got := readAll(t, rc, err); !bytes.Equal(got, m.layers[i].Blob) {
			t.Errorf("%s: %d bytes", arch, len(got))
		}
	}
	first, err := s.Referrers(ctx, m.manifests[0].Digest, artifact)
	if err != nil || len(first) != 1 {
		t.Fatalf("referrers %+v, %v", first, err)
	}
	if second, err := s.Referrers(ctx, first[0].Digest, ""); err != nil || len(second) != 1 {
		t.Errorf("referrers of the referrer %+v, %v", second, err)
	}
}

func TestCopyPlatform(t *testing.T) {
	m := startMulti(t, registrytest.Options{})
	c := client(t)
	d := dest(t, c, "oci:"+filepath.Join(t.TempDir(), "x"))
	got, err := transport.Copy(t.Context(), source(t, c, m.Host()+"/library/x:v1"), d,
		transport.CopyOptions{Platform: &ocispec.Platform{OS: "linux", Architecture: "arm64"}})
	if err != nil || got.Digest != m.manifests[1].Digest {
		t.Errorf("copied %+v, %v", got, err)
	}
	if has, err := d.Has(t.Context(), m.manifests[0]); err != nil || has {
		t.Errorf("the other platform was copied: %v", err)
	}
}

// TestDockerLoadHasNoIndexes: an archive for docker load has one image.
func TestDockerLoadHasNoIndexes(t *testing.T) {
	m := startMulti(t, registrytest.Options{})
	dir := t.TempDir()
	d := dest(t, nil, "docker-archive:"+dir+"/x.tar")
	_, err := transport.Copy(t.Context(), source(t, client(t), m.Host()+"/library/x:v1"), d, transport.CopyOptions{})
	if !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), "choose a platform") {
		t.Errorf("error %v", err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	if list, err := os.ReadDir(dir); err != nil || len(list) != 0 {
		t.Errorf("left over: %v, %v", list, err)
	}
}

// TestCopyMounts copies between repositories of one registry: no byte moves.
func TestCopyMounts(t *testing.T) {
	m := startMulti(t, registrytest.Options{})
	c := client(t)
	var j jobs
	_, err := transport.Copy(t.Context(), source(t, c, m.Host()+"/library/x:v1"), dest(t, c, m.Host()+"/other:v1"), transport.CopyOptions{Progress: &j})
	if err != nil || j.bytes != 0 || j.count("taken over from the source's repository") != len(j.notes) {
		t.Errorf("%d bytes, %q, %v", j.bytes, j.notes, err)
	}
}

// TestCopyRetries loses a body on each side.
func TestCopyRetries(t *testing.T) {
	m := startMulti(t, registrytest.Options{})
	to := registrytest.Start(t, registrytest.Options{})
	to.Fault("/uploads/1", 1, registrytest.Truncate(1))
	m.Fault("/blobs/", 1, registrytest.Truncate(10))
	c := client(t)
	var j jobs
	if _, err := transport.Copy(t.Context(), source(t, c, m.Host()+"/library/x:v1"), dest(t, c, to.Host()+"/library/y:v1"), transport.CopyOptions{Progress: &j, Parallel: 1}); err != nil {
		t.Fatal(err)
	}
	var want int64
	for _, r := range to.Requests("/blobs/sha256") {
		want += to.BlobStats(digest.Digest(r.Path[strings.LastIndex(r.Path, "/")+1:])).Bytes
	}
	if j.bytes <= want {
		t.Errorf("%d bytes reported", j.bytes)
	}
}

// TestCopyRefuses copies what is damaged at the source.
func TestCopyRefuses(t *testing.T) {
	m := startMulti(t, registrytest.Options{})
	m.PushBlobAs("library/x", digest.FromBytes(m.layers[1].Blob), append(bytes.Clone(m.layers[1].Blob[1:]), 0))
	c := client(t)
	file := filepath.Join(t.TempDir(), "x.tar")
	for _, place := range []string{registrytest.Start(t, registrytest.Options{}).Host() + "/y:v1", "oci:" + filepath.Join(t.TempDir(), "x"), "oci-archive:" + file} {
		d := dest(t, c, place)
		_, err := transport.Copy(t.Context(), source(t, c, m.Host()+"/library/x:v1"), d, transport.CopyOptions{})
		if !errdefs.IsDataLoss(err) || !strings.Contains(err.Error(), digest.FromBytes(m.layers[1].Blob).String()) {
			t.Errorf("%s: %v", place, err)
		}
		if has, err := d.Has(t.Context(), m.index); err != nil || has {
			t.Errorf("%s: half an image was tagged: %v", place, err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	}
	if list, err := os.ReadDir(filepath.Dir(file)); err != nil || len(list) != 0 {
		t.Errorf("left over: %v, %v", list, err)
	}
}

// TestArchiveIsDeterministic writes one image twice.
func TestArchiveIsDeterministic(t *testing.T) {
	var made [][]byte
	for range 2 {
		file := filepath.Join(t.TempDir(), "x.tar")
		d := dest(t, nil, "docker-archive:"+file+":debian:12")
		pushImage(t, d, "hello", d.Tag())
		if err := d.Close(); err != nil {
			t.Fatal(err)
		}
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		made = append(made, data)
	}
	if !bytes.Equal(made[0], made[1]) {
		t.Error("the archives differ")
	}
}

// dockerSave is an archive as docker before version 25 writes it: two images
// with one layer, the second as a symbolic link.
func dockerSave(t *testing.T) (file string, layer []byte) {
	t.Helper()
	layer = registrytest.Must(registrytest.Tar(registrytest.File("f", 0o644, strings.Repeat("hello", 1000))))
	packed := registrytest.Must(registrytest.Gzip(layer))
	config := func(arch string) []byte {
		return marshal(t, ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: arch}, RootFS: ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{digest.FromBytes(layer)}}})
	}
	list := []map[string]any{
		{"Config": "a.json", "RepoTags": []string{"debian:12", "localhost:5000/x:1"}, "Layers": []string{"1/layer.tar"}},
		{"Config": "b.json", "RepoTags": nil, "Layers": []string{"2/layer.tar"}},
		{"Config": "b.json", "RepoTags": []string{"packed:1"}, "Layers": []string{"3/layer.tar"}},
	}
	data := registrytest.Must(registrytest.Tar(
		registrytest.File("a.json", 0o644, string(config("amd64"))),
		registrytest.File("b.json", 0o644, string(config("arm64"))),
		registrytest.Dir("1/", 0o755), registrytest.File("1/layer.tar", 0o644, string(layer)),
		registrytest.Symlink("2/layer.tar", "../1/layer.tar"),
		registrytest.File("3/layer.tar", 0o644, string(packed.Blob)),
		registrytest.File("manifest.json", 0o644, string(registrytest.Must(json.Marshal(list)))),
	))
	file = filepath.Join(t.TempDir(), "save.tar")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return file, layer
}

func TestDockerArchive(t *testing.T) {
	file, layer := dockerSave(t)
	for object, arch := range map[string]string{":debian:12": "amd64", ":docker.io/library/debian:12": "amd64", ":localhost:5000/x:1": "amd64", ":@1": "arm64", ":packed:1": "arm64"} {
		s := source(t, nil, "docker-archive:"+file+object)
		img, err := transport.Resolve(t.Context(), s, object, ocispec.Platform{OS: "linux", Architecture: arch})
		if err != nil {
			t.Fatalf("%s: %v", object, err)
		}
		l := img.Layers[0]
		rc, err := s.Open(t.Context(), l.Descriptor)
		got := readAll(t, rc, err)
		if packed := object == ":packed:1"; packed != (l.MediaType == ocispec.MediaTypeImageLayerGzip) || packed == bytes.Equal(got, layer) || l.DiffID != digest.FromBytes(layer) {
			t.Errorf("%s: layer %+v, %d bytes", object, l, len(got))
		}
	}
	for object, class := range map[string]func(error) bool{"": errdefs.IsInvalidArgument, ":debian:13": errdefs.IsNotFound, ":@9": errdefs.IsNotFound} {
		if _, _, err := source(t, nil, "docker-archive:"+file+object).GetManifest(t.Context(), ""); !class(err) || !strings.Contains(err.Error(), "docker.io/library/debian:12") {
			t.Errorf("%s: %v", object, err)
		}
	}
}

// TestBadFiles opens what is no image.
func TestBadFiles(t *testing.T) {
	dir := t.TempDir()
	file, _ := dockerSave(t)
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	packed := registrytest.Must(registrytest.Gzip(data))
	entries := func(e ...registrytest.Entry) []byte { return registrytest.Must(registrytest.Tar(e...)) }
	list := func(s string) registrytest.Entry { return registrytest.File("manifest.json", 0o644, s) }
	for name, tc := range map[string]struct {
		data []byte
		text string
	}{
		"gzip":           {packed.Blob, "gunzip -k"},
		"empty":          {nil, "no archive of docker save"},
		"no tar":         {[]byte(strings.Repeat("x", 2000)), "read tar"},
		"cut":            {data[:600], "read tar"},
		"no json":        {entries(list("[")), "decode manifest.json"},
		"no config":      {entries(list(`[{"Config":"../x","Layers":[]}]`)), "no file"},
		"no layer":       {entries(list(`[{"Config":"c","Layers":["l"]}]`), registrytest.File("c", 0o644, `{"rootfs":{"diff_ids":["sha256:`+strings.Repeat("0", 64)+`"]}}`)), "no file"},
		"no diffID":      {entries(list(`[{"Config":"c","Layers":["l"]}]`), registrytest.File("c", 0o644, `{}`)), "0 diffIDs"},
		"bad diffID":     {entries(list(`[{"Config":"c","Layers":["c"]}]`), registrytest.File("c", 0o644, `{"rootfs":{"diff_ids":["x"]}}`)), "diffID"},
		"loop of links":  {entries(registrytest.Symlink("a", "b"), registrytest.Symlink("b", "a"), list(`[{"Config":"a","Layers":[]}]`)), "no file"},
		"layout version": {entries(registrytest.File("oci-layout", 0o644, `{"imageLayoutVersion":"9"}`)), "version"},
	} {
		t.Run(name, func(t *testing.T) {
			p := filepath.Join(dir, "x.tar")
			if err := os.WriteFile(p, tc.data, 0o600); err != nil {
				t.Fatal(err)
			}
			_, err := transport.OpenSource(parse(t, "docker-archive:"+p), transport.Options{})
			if err == nil || !strings.Contains(err.Error(), tc.text) || !strings.Contains(err.Error(), p) {
				t.Errorf("error %v", err)
			}
		})
	}
	if _, err := transport.OpenSource(parse(t, "oci:"+filepath.Join(dir, "none")), transport.Options{}); !errdefs.IsNotFound(err) {
		t.Errorf("no directory: %v", err)
	}
	if _, err := transport.OpenDest(parse(t, "oci:"+dir), transport.Options{}); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("a directory of something else: %v", err)
	}
	if _, err := transport.OpenSource(parse(t, "debian"), transport.Options{}); !errdefs.IsInvalidArgument(err) {
		t.Errorf("no client: %v", err)
	}
}

func TestParse(t *testing.T) {
	for in, want := range map[string]string{
		"debian": "docker debian latest docker.io/library/debian:latest", "docker://localhost:5000/x:1": "docker 1 localhost:5000/x:1",
		"oci:dir": "oci dir oci:dir", "oci:a/b:v1": "oci a/b v1 oci:a/b:v1", "docker-archive:f.tar:debian:12": "docker-archive f.tar debian:12 docker-archive:f.tar:debian:12",
		"oci-archive:f.tar:v1": "oci-archive f.tar v1 oci-archive:f.tar:v1", "oci:": "", "docker-archive::x": "", "": "", "docker://": "", "UPPER": "",
	} {
		n, err := transport.Parse(in)
		if want == "" {
			if !errdefs.IsInvalidArgument(err) {
				t.Errorf("%q: %v", in, err)
			}
			continue
		}
		fields := strings.Fields(want)
		if err != nil || string(n.Kind) != fields[0] || n.String() != fields[len(fields)-1] || n.Object != "" && !slices.Contains(fields, n.Object) {
			t.Errorf("%q: %+v %s, %v", in, n, n, err)
		}
	}
}

// TestSkopeo reads what skopeo writes and has it read what we write.
func TestSkopeo(t *testing.T) {
	dir := t.TempDir()
	d := dest(t, nil, "oci:"+dir+"/start:v1")
	desc, _ := pushImage(t, d, strings.Repeat("hello", 1000), "v1")
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"oci:" + dir + "/copy:v1", "oci-archive:" + dir + "/oci.tar:v1", "docker-archive:" + dir + "/docker.tar:example.com/x:v1"} {
		tool(t, "skopeo", "copy", "--insecure-policy", "oci:"+dir+"/start:v1", name)
		s := source(t, nil, name)
		got, _, err := s.GetManifest(t.Context(), "")
		if docker := strings.HasPrefix(name, "docker"); err != nil || docker == (got.Digest == desc.Digest) {
			t.Errorf("%s: %+v, %v", name, got, err)
		}
		for _, kind := range []string{"oci:", "oci-archive:", "docker-archive:"} {
			ours := kind + filepath.Join(t.TempDir(), "ours") + ":example.com/x:v1"
			to := dest(t, nil, ours)
			if _, err := transport.Copy(t.Context(), s, to, transport.CopyOptions{}); err != nil {
				t.Fatalf("%s to %s: %v", name, ours, err)
			}
			if err := to.Close(); err != nil {
				t.Fatal(err)
			}
			var info struct{ Layers []string }
			if err := json.Unmarshal([]byte(tool(t, "skopeo", "inspect", ours)), &info); err != nil || len(info.Layers) != 1 {
				t.Errorf("%s: %v, %v", ours, info, err)
			}
			// skopeo checks diffIDs when it unpacks the layer for docker.
			tool(t, "skopeo", "copy", "--insecure-policy", ours, "docker-archive:"+filepath.Join(t.TempDir(), "back.tar")+":x:v1")
		}
	}
}
