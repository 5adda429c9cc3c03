package layer_test

import (
	"testing"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
)

func TestRandomAccess(t *testing.T) {
	const far = 32 << 20
	at := func(outs ...int64) (points []index.Checkpoint) {
		for _, out := range outs {
			points = append(points, index.Checkpoint{Out: out})
		}
		return points
	}
	// The second extent lies before the first in the tar.
	data := []index.Extent{{Seg: 0, Tar: far, Len: far}, {Seg: far, Tar: 512, Len: 1000}}
	for _, c := range []struct {
		name    string
		format  index.Format
		points  []index.Checkpoint
		extents []index.Extent
		want    bool
	}{
		{"one frame for little", index.Zstd, at(0), []index.Extent{{Tar: 512, Len: far - 512}}, true},
		{"one frame for much", index.Zstd, at(0), []index.Extent{{Tar: 512, Len: far - 511}}, false},
		{"close frames", index.Zstd, at(0, far), data, true},
		{"far apart", index.Zstd, at(0, far+1), data, false},
		{"last one far from the end", index.Gzip, at(0, far-1), data, false},
		{"close checkpoints", index.Gzip, at(0, far/2, far, far+1), data, true},
		{"nothing behind the last extent counts", index.Gzip, at(0, 9*far), data[1:], true},
		{"no data", index.Zstd, at(0), nil, true},
		{"plain", index.Tar, nil, data, true},
		{"pieces", index.Chunked, at(0, 9*far), nil, true},
	} {
		l := &index.Layer{Access: index.Access{Format: c.format, Checkpoints: c.points, Extents: c.extents}}
		if got := layer.RandomAccess(l); got != c.want {
			t.Errorf("%s: %v", c.name, got)
		}
	}
}
