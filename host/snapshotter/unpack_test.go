package snapshotter

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/diff/apply"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/plugins/content/local"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// containerd's own code unpacks a layer over an image of the node. A directory
// of which the layer has only a file keeps the attributes that it has below.
func TestContainerdUnpacks(t *testing.T) {
	needRoot(t)
	g := newRig(t, Guest)
	base := tree{"secret/below": "b"}
	first := g.pull(t, "k8s.io", "a:1", g.images.publish(t, "", base))
	lower := must(g.images.Mount(t.Context(), "run", Chain{Manifest: first.manifest, Layers: 1, Of: 1}))(t)
	if err := os.Chmod(filepath.Join(lower, "secret"), 0o700|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	second := g.images.publish(t, "it is encrypted", base, tree{"secret/above": "a"})
	chain := chainIDs(must(g.images.image(second))(t).DiffIDs)[1]
	key, opt := "k8s.io/5/extract-5 "+chain, snapshots.WithLabels(layerLabels("b:1", second, chain))
	must(g.Prepare(t.Context(), key, first.top(), opt))(t)
	mounts := must(g.Mounts(t.Context(), key))(t)

	var layer bytes.Buffer
	w := tar.NewWriter(&layer)
	if err := w.WriteHeader(&tar.Header{Name: "secret/above", Typeflag: tar.TypeReg, Mode: 0o600, Size: 1}); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Write([]byte("a")); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	desc := ocispec.Descriptor{MediaType: ocispec.MediaTypeImageLayer, Digest: digest.FromBytes(layer.Bytes()), Size: int64(layer.Len())}
	store := must(local.NewStore(t.TempDir()))(t)
	if err := content.WriteBlob(t.Context(), store, "layer", &layer, desc); err != nil {
		t.Fatal(err)
	}
	if _, err := apply.NewFileSystemApplier(store).Apply(t.Context(), desc, mounts); err != nil {
		t.Fatal(err)
	}
	if err := g.Commit(t.Context(), "top", key, opt); err != nil {
		t.Fatal(err)
	}
	root := mounted(t, must(g.Prepare(t.Context(), "c", "top"))(t))
	checkFiles(t, root, tree{"secret/below": "b", "secret/above": "a"})
	if st := must(os.Stat(filepath.Join(root, "secret")))(t); st.Mode().Perm() != 0o700 || st.Mode()&os.ModeSticky == 0 {
		t.Errorf("mode %s", st.Mode())
	}
}
