package formats

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"path/filepath"
	"runtime"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/ocilayout"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tests/treecmp"
)

// many is more layers than overlayfs and old drivers could stack.
const many = 130

// TestManifests mounts images whose manifests are out of the ordinary.
func TestManifests(t *testing.T) {
	need(t, "docker-registry")
	reg, n := startRegistry(t), newNode(t)
	for _, c := range []struct {
		name  string
		tars  [][]byte
		types []string // media types of the layers, in turn; OCI's gzip when empty
	}{
		{"many-layers", manyLayers(), nil},
		{"duplicate-layers", duplicates(), nil},
		{"foreign-layers", torture.Layers(), []string{
			"application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
			"application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			dir := layoutDir(t)
			img := image(t, dir, c.tars, runtime.GOARCH)
			for i := range img.Manifest.Layers {
				if len(c.types) > 0 {
					img.Manifest.Layers[i].MediaType = c.types[i%len(c.types)]
				}
			}
			if err := dir.Finish(img); err != nil {
				t.Fatal(err)
			}
			reg.pushBlobs(t, dir, c.name, img.Manifest.Layers)
			reg.push(t, string(dir), c.name, "v1")
			got, err := n.mounted(t, reg.host+"/"+c.name+":v1")
			if err != nil {
				t.Fatal(err)
			}
			compare(t, got, overlaid(t, reference(t, c.tars)), treecmp.Nlink)
		})
	}
}

// TestPlatforms mounts both images of an index, and of Docker's list.
func TestPlatforms(t *testing.T) {
	need(t, "docker-registry")
	reg, n := startRegistry(t), newNode(t)
	for _, mediaType := range []string{ocispec.MediaTypeImageIndex, registrytest.DockerManifestList} {
		repo := map[string]string{ocispec.MediaTypeImageIndex: "index", registrytest.DockerManifestList: "list"}[mediaType]
		dir := layoutDir(t)
		index := ocispec.Index{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: mediaType}
		for _, arch := range []string{"amd64", "arm64"} {
			desc, err := dir.PutImage(image(t, dir, [][]byte{torture.Large(200), named(arch)}, arch))
			if err != nil {
				t.Fatal(err)
			}
			desc.Platform = &ocispec.Platform{OS: "linux", Architecture: arch}
			index.Manifests = append(index.Manifests, desc)
		}
		desc, err := dir.PutJSON(mediaType, index)
		if err == nil {
			err = dir.Seal(desc)
		}
		if err != nil {
			t.Fatal(err)
		}
		reg.push(t, string(dir), repo, "v1")
		for _, arch := range []string{"amd64", "arm64"} {
			t.Run(repo+"/"+arch, func(t *testing.T) {
				got, err := n.mounted(t, reg.host+"/"+repo+":v1", "--platform", "linux/"+arch)
				if err != nil {
					t.Fatal(err)
				}
				compare(t, got, overlaid(t, [][]byte{torture.Large(200), named(arch)}))
			})
		}
	}
}

// named is a layer with one file, named as told.
func named(name string) []byte {
	l := torture.NewTar()
	l.File(name, name)
	return l.Bytes()
}

// manyLayers each add a file and change a common one. None removes anything.
func manyLayers() [][]byte {
	var tars [][]byte
	for i := range many {
		l := torture.NewTar()
		l.File(fmt.Sprintf("layer-%d", i), fmt.Sprint(i))
		l.File("common", fmt.Sprint(i), torture.Mode(0o600+int64(i%8)))
		tars = append(tars, l.Bytes())
	}
	return tars
}

// duplicates has a layer twice, and layers that are empty.
func duplicates() [][]byte {
	empty := torture.NewTar().Bytes()
	large := torture.Large(200)
	removed := torture.NewTar()
	removed.File("large/.wh.entry-7", "")
	return [][]byte{empty, large, named("a"), removed.Bytes(), large, empty, named("a"), empty}
}

// reference joins layers that one overlay of directories has no room for in its
// mount options (a page) and that remove nothing.
func reference(t *testing.T, tars [][]byte) [][]byte {
	t.Helper()
	if len(tars) < many {
		return tars
	}
	var buf bytes.Buffer
	tw := tar.NewWriter(&buf)
	for _, b := range tars {
		err := eachEntry(b, func(h *tar.Header, content io.Reader) error {
			h.Xattrs = nil //nolint:staticcheck // the reader fills it with what is in PAXRecords
			if err := tw.WriteHeader(h); err != nil {
				return err
			}
			_, err := io.Copy(tw, content)
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	if err := tw.Close(); err != nil {
		t.Fatal(err)
	}
	return [][]byte{buf.Bytes()}
}

func layoutDir(t *testing.T) ocilayout.Dir {
	t.Helper()
	dir, err := ocilayout.Create(filepath.Join(t.TempDir(), "layout"))
	if err != nil {
		t.Fatal(err)
	}
	return dir
}

// image puts gzip layers, the lowest first, into a layout.
func image(t *testing.T, dir ocilayout.Dir, tars [][]byte, arch string) ocilayout.Image {
	t.Helper()
	img := ocilayout.Image{Config: ocispec.Image{
		Platform: ocispec.Platform{OS: "linux", Architecture: arch},
		RootFS:   ocispec.RootFS{Type: "layers"},
	}}
	for _, tar := range tars {
		desc, err := dir.PutFrom(ocispec.MediaTypeImageLayerGzip, func(w io.Writer) error { return compress(w, tar) })
		if err != nil {
			t.Fatal(err)
		}
		img.Manifest.Layers = append(img.Manifest.Layers, desc)
		img.Config.RootFS.DiffIDs = append(img.Config.RootFS.DiffIDs, digest.FromBytes(tar))
	}
	return img
}
