package bootstrap_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tests/treecmp"
)

// umociDiffers are the differences that are umoci's own (0.4.7).
func umociDiffers(diff string) bool {
	return slices.ContainsFunc([]string{
		// It reads attributes through tar.Header.Xattrs, which has no empty ones.
		`"attr/user": xattr: user.b absent`,
		// A marker behind the directory's entry leaves it the time of unpacking.
		`"gone/remade2": mtime`,
		`"opaque": mtime`,
		// An opaque mark removes the directories below at once, so that one made
		// again without an entry has nothing to inherit.
		`"opaque/implied": mode`,
		`"opaque/implied": owner`,
		`"opaque/implied": mtime`,
		`"opaque/implied": xattr`,
	}, func(s string) bool { return strings.HasPrefix(diff, s) })
}

// An unpacker that works in one merged tree comes to the same result.
func TestUmoci(t *testing.T) {
	if _, err := exec.LookPath("umoci"); err != nil {
		t.Skip("needs umoci in PATH")
	}
	dir := torture.TempFS(t)
	tars := torture.Layers()
	layout := filepath.Join(dir, "layout")
	writeLayout(t, layout, tars)
	bundle := filepath.Join(dir, "bundle")
	if out, err := exec.CommandContext(t.Context(), "umoci", "unpack", "--image", layout+":latest", bundle).CombinedOutput(); err != nil {
		t.Fatalf("umoci: %v\n%s", err, out)
	}
	want := snapshot(t, filepath.Join(bundle, "rootfs"))
	file, _ := imageFile(t, tars, t.TempDir())
	got := snapshot(t, torture.MountImage(t, file, dir, true))
	report(t, "umoci, image", slices.DeleteFunc(treecmp.Diff(want, got), umociDiffers))
}

// writeLayout makes an OCI layout with one image of uncompressed layers.
func writeLayout(t *testing.T, dir string, tars [][]byte) {
	t.Helper()
	blobs := filepath.Join(dir, "blobs", "sha256")
	if err := os.MkdirAll(blobs, 0o755); err != nil {
		t.Fatal(err)
	}
	type object = map[string]any
	put := func(mediaType string, b []byte) object {
		d := digest.FromBytes(b)
		if err := os.WriteFile(filepath.Join(blobs, d.Encoded()), b, 0o644); err != nil {
			t.Fatal(err)
		}
		return object{"mediaType": mediaType, "digest": d, "size": len(b)}
	}
	encode := func(v any) []byte {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	var layers []object
	var diffIDs []digest.Digest
	for _, l := range tars {
		layers = append(layers, put("application/vnd.oci.image.layer.v1.tar", l))
		diffIDs = append(diffIDs, digest.FromBytes(l))
	}
	config := put("application/vnd.oci.image.config.v1+json", encode(object{
		"architecture": "amd64", "os": "linux", "config": object{},
		"rootfs": object{"type": "layers", "diff_ids": diffIDs},
	}))
	manifest := put("application/vnd.oci.image.manifest.v1+json", encode(object{
		"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": config, "layers": layers,
	}))
	manifest["annotations"] = object{"org.opencontainers.image.ref.name": "latest"}
	files := map[string]any{
		"oci-layout": object{"imageLayoutVersion": "1.0.0"},
		"index.json": object{"schemaVersion": 2, "manifests": []object{manifest}},
	}
	for name, v := range files {
		if err := os.WriteFile(filepath.Join(dir, name), encode(v), 0o644); err != nil {
			t.Fatal(err)
		}
	}
}
