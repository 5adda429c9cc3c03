package daemon

import (
	"bytes"
	"context"
	"io"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/rootfs/bootstrap"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/rootfs/layer/estargz"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tests/treecmp"
)

// listed returns the one mount of the guest.
func (g *guest) listed() *api.Mount {
	g.t.Helper()
	list, err := g.List(g.t.Context(), &api.ListRequest{})
	if err != nil || len(list.Mounts) != 1 {
		g.t.Fatalf("list %v, %v", list, err)
	}
	return list.Mounts[0]
}

// from returns what the guest counts of a source.
func (g *guest) from(source string) *api.SourceStats {
	g.t.Helper()
	for _, s := range g.stats().Sources {
		if s.Name == source {
			return s
		}
	}
	return &api.SourceStats{Name: source}
}

// TestTheNodesFile mounts the node's image file as it is: neither index nor
// bytes come over the relay, the tree is that of the relay, readers do not
// notice the worker's death, and the next worker knows the mount.
func TestTheNodesFile(t *testing.T) {
	for _, path := range []string{"file", "loop"} {
		t.Run(path, func(t *testing.T) {
			n := newNode(t)
			img := n.pushSample("sample")
			for _, id := range []string{"relay", "direct"} {
				n.add(id, sampleRef, img, "host")
			}
			dir := t.TempDir()
			file := n.show(dir, img)
			g := startGuest(t, n, "--mount-path", path, "--virtiofs-dirs", "/none/at/all,"+dir)
			resp, err := g.Mount(t.Context(), &api.MountRequest{Id: "direct", Target: g.path("direct")})
			if err != nil {
				t.Fatal(err)
			}
			if resp.Source != "virtio-fs" || resp.Path != path || len(resp.Config) == 0 || len(resp.Phases) == 0 {
				t.Errorf("answer %v", resp)
			}
			for _, what := range []string{"/referrers/", "/segments/"} {
				if r := n.reg.Requests(what); len(r) > 0 {
					t.Errorf("asked the relay for %v", r)
				}
			}
			good := n.reg.Fault("", 0, registrytest.Status(500)) // nothing is needed of it any more
			size := int64(len(n.files[img.Desc.Digest]))
			if m := g.listed(); m.Source != "virtio-fs" || m.ImageSize != size || m.Present != 0 || m.Complete {
				t.Errorf("listed as %v", m)
			}
			if s := g.from("virtio-fs"); s.Requests != 1 || s.Bytes != 0 {
				t.Errorf("counted %v", s)
			}
			load := startLoad(g.path("direct"))
			defer load.stop()
			for range 3 {
				load.await(20)
				if err := unix.Kill(g.workerPID(), unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
			load.await(20)
			for _, err := range load.stop() {
				t.Error(err)
			}
			g.connect()
			if m := g.listed(); m.Source != "virtio-fs" || m.ImageSize != size || m.Path != path {
				t.Errorf("after the worker's death listed as %v", m)
			}
			if again, err := g.Mount(t.Context(), &api.MountRequest{Id: "direct", Target: g.path("direct")}); err != nil || again.Source != "virtio-fs" {
				t.Errorf("the same again: %v, %v", again, err)
			}
			if _, err := g.Prefetch(t.Context(), &api.PrefetchRequest{Id: "direct"}); err != nil {
				t.Error(err)
			}
			direct, err := treecmp.Snapshot(g.path("direct"))
			if err != nil {
				t.Fatal(err)
			}
			if _, err := g.Unmount(t.Context(), &api.UnmountRequest{Id: "direct"}); err != nil {
				t.Error(err)
			}
			good()
			if err := os.Remove(file); err != nil {
				t.Fatal(err)
			}
			resp, err = g.Mount(t.Context(), &api.MountRequest{Id: "relay", Target: g.path("relay")})
			if err != nil || resp.Source != "relay" || g.listed().Source != "relay" {
				t.Fatalf("without the file: %v, %v", resp, err)
			}
			relay, err := treecmp.Snapshot(g.path("relay"))
			if err != nil {
				t.Fatal(err)
			}
			if d := treecmp.Diff(direct, relay); len(d) > 0 {
				t.Errorf("trees differ: %q", d)
			}
		})
	}
}

// TestNoUseOfTheNodesFile falls back to the relay and says why.
func TestNoUseOfTheNodesFile(t *testing.T) {
	for name, tc := range map[string]struct {
		flags  []string
		change func(t *testing.T, path string)
		says   string
	}{
		"missing":   {nil, func(t *testing.T, path string) { must(t, os.Remove(path)) }, "the node has no image file"},
		"no image":  {nil, func(t *testing.T, path string) { must(t, os.WriteFile(path, make([]byte, 8192), 0o600)) }, "is no EROFS image"},
		"cut":       {nil, func(t *testing.T, path string) { must(t, os.Truncate(path, 5000)) }, "not whole blocks"},
		"directory": {nil, func(t *testing.T, path string) { must(t, os.Remove(path)); must(t, os.Mkdir(path, 0o700)) }, "no regular file"},
		"off":       {[]string{"--virtiofs", "off"}, func(*testing.T, string) {}, ""},
	} {
		t.Run(name, func(t *testing.T) {
			n := newNode(t)
			img := n.pushSample("sample")
			n.add("c1", sampleRef, img, "host")
			dir := t.TempDir()
			tc.change(t, n.show(dir, img))
			g := startGuest(t, n, append(tc.flags, "--virtiofs-dirs", dir)...)
			root := g.mustPull("c1", sampleRef)
			if got, err := readAll(filepath.Join(root, samplePath(3))); err != nil || got != sampleContent(3) {
				t.Errorf("%d bytes, %v", len(got), err)
			}
			if m := g.listed(); m.Source != "relay" {
				t.Errorf("listed as %v", m)
			}
			if !g.log.says(tc.says) {
				t.Errorf("the log does not say %q", tc.says)
			}
			if s := g.from("virtio-fs"); s.Requests != 0 {
				t.Errorf("counted %v", s)
			}
		})
	}
}

func must(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestTheNodesFileAsASource reads the node's file where only the image's own word
// counts: every chunk is verified, and the next worker reads on from there.
func TestTheNodesFileAsASource(t *testing.T) {
	const ref = "example.com/stargz:v1"
	n := newNode(t)
	entries := []registrytest.Entry{registrytest.Dir("data/", 0o755)}
	for i := range sampleFiles {
		entries = append(entries, registrytest.File(samplePath(i), 0o640, sampleContent(i)))
	}
	l := registrytest.Must(registrytest.EStargz(registrytest.Must(registrytest.Tar(entries...))))
	img := n.reg.PushImage("stargz", "v1", registrytest.Image{Layers: []registrytest.Layer{l}})
	n.files[img.Desc.Digest] = fileOfTOC(t, img, l)
	n.add("c1", ref, img, "host")
	dir := t.TempDir()
	n.show(dir, img)
	g := startGuest(t, n, "--trust", "image", "--virtiofs-dirs", dir)
	root := g.mustPull("c1", ref)
	n.reg.Fault("/segments/", 0, registrytest.Status(500))
	for i := range sampleFiles {
		if i == sampleFiles/2 {
			s := g.from("virtio-fs")
			if s.Bytes == 0 || g.stats().VerifyFailures > 0 {
				t.Errorf("counted %v", s)
			}
			must(t, unix.Kill(g.workerPID(), unix.SIGKILL))
		}
		if got, err := readAll(filepath.Join(root, samplePath(i))); err != nil || got != sampleContent(i) {
			t.Fatalf("%s: %d bytes, %v", samplePath(i), len(got), err)
		}
	}
	g.connect()
	if m, s := g.listed(), g.from("virtio-fs"); m.Source != "virtio-fs" || m.ImageSize != int64(len(n.files[img.Desc.Digest])) || s.Bytes == 0 {
		t.Errorf("listed as %v, counted %v", m, s)
	}
}

// fileOfTOC is the one-file image that the table of contents of its eStargz layer
// makes.
func fileOfTOC(t *testing.T, img registrytest.Pushed, l registrytest.Layer) []byte {
	t.Helper()
	sum, ok := estargz.TOC(img.Layers[0].Annotations)
	if !ok {
		t.Fatalf("no table of contents: %v", img.Layers[0].Annotations)
	}
	made, err := estargz.Open(t.Context(), memoryBlob(l.Blob), img.Layers[0], sum)
	must(t, err)
	idx, err := bootstrap.Build(img.Desc.Digest, []*index.Layer{made})
	must(t, err)
	r, err := layer.NewReader(made, func(index.BlobRef) layer.Blob { return memoryBlob(l.Blob) }).Open(t.Context(), 0, made.Table.Size)
	must(t, err)
	defer r.Close()
	data, err := io.ReadAll(r)
	must(t, err)
	return append(bytes.Clone(idx.Bootstrap), data...)
}

// memoryBlob is a layer.Blob.
type memoryBlob []byte

func (b memoryBlob) Size() int64 { return int64(len(b)) }

func (b memoryBlob) ReadRange(_ context.Context, off, n int64) (io.ReadCloser, error) {
	return io.NopCloser(io.NewSectionReader(bytes.NewReader(b), off, n)), nil
}
