package bootstrap_test

import (
	"path/filepath"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/bootstrap"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tests/treecmp"
)

func manifest() digest.Digest { return digest.FromString("manifest") }

// parse makes the layers' indexes and the bytes of their segments.
func parse(t testing.TB, tars [][]byte) ([]*index.Layer, map[index.ID][]byte) {
	t.Helper()
	var layers []*index.Layer
	segments := map[index.ID][]byte{}
	for _, tar := range tars {
		l, segment, err := torture.Index(tar)
		if err != nil {
			t.Fatal(err)
		}
		layers = append(layers, l)
		segments[l.Table.ID()] = segment
	}
	return layers, segments
}

// imageFile builds the image and writes it with all data to a file in dir.
func imageFile(t testing.TB, tars [][]byte, dir string) (string, *index.Image) {
	t.Helper()
	layers, segments := parse(t, tars)
	img, err := bootstrap.Build(manifest(), layers)
	if err != nil {
		t.Fatal(err)
	}
	if err := img.Validate(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "image.erofs")
	if err := torture.WriteImage(file, img, segments); err != nil {
		t.Fatal(err)
	}
	return file, img
}

func snapshot(t testing.TB, root string) treecmp.Tree {
	t.Helper()
	tree, err := treecmp.Snapshot(root)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// report fails the test with the first differences between two trees.
func report(t testing.TB, what string, diffs []string) {
	t.Helper()
	for i, d := range diffs {
		if i == 40 {
			t.Errorf("%s: and %d more", what, len(diffs)-i)
			return
		}
		t.Errorf("%s: %s", what, d)
	}
}
