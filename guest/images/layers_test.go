package images

import (
	"bytes"
	"io"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/layer"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// What is needed to read a layer from a registry is kept, also for the next process,
// for as long as the layer is used, and no longer.
func TestKeepLayers(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "layers")
	c := &layerCache{dir: dir}
	if err := c.keepOnly(nil); err != nil {
		t.Errorf("before there is any: %v", err)
	}
	var keys []cacheKey
	for _, name := range []string{"used", "other"} {
		blob := registrytest.Must(registrytest.Gzip(registrytest.Must(registrytest.Tar(registrytest.File(name, 0o644, name)))))
		desc := layer.Descriptor{MediaType: blob.MediaType, Digest: digest.FromBytes(blob.Blob), Size: int64(len(blob.Blob))}
		l, err := layer.Build(t.Context(), bytes.NewReader(blob.Blob), desc, io.Discard, layer.Options{})
		if err == nil {
			err = c.put(l)
		}
		if err != nil {
			t.Fatal(err)
		}
		keys = append(keys, cacheKey{l.Blob, l.Table.ID()})
	}
	if err := os.WriteFile(filepath.Join(dir, "new-1"), nil, 0o600); err != nil { // of a process that was killed
		t.Fatal(err)
	}
	if err := c.keepOnly(map[digest.Digest]bool{keys[0].blob: true, digest.FromString("another"): true}); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*layerCache{c, {dir: dir}} {
		if _, err := c.get(keys[0]); err != nil {
			t.Errorf("the layer that is used: %v", err)
		}
		if _, err := c.get(keys[1]); !errdefs.IsNotFound(err) {
			t.Errorf("the other one: %v", err)
		}
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("%d files are left, %v", len(left), err)
	}
}
