package daemon

import (
	"fmt"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"google.golang.org/protobuf/proto"

	"github.com/tatami-containers/tatami/host/config"
	"github.com/tatami-containers/tatami/host/snapshotter"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// A node with many snapshots has an answer that fits, and says what it lacks.
func TestStatusFits(t *testing.T) {
	const count = 1000
	var entries []snapshotter.Entry
	for i := range count {
		entries = append(entries, snapshotter.Entry{
			Key: fmt.Sprintf("k8s.io/%d/%s", i, strings.Repeat("k", 4000)), Kind: snapshots.KindActive,
			Mode: snapshotter.Full, Reason: strings.Repeat("r", 1000),
		})
	}
	room := statusRoom
	out := &api.StatusResponse{}
	for range 2 {
		out.Snapshotters = append(out.Snapshotters, status(config.Snapshotter{Name: "tatami"}, entries, new(work).classOf, &room))
	}
	if size := proto.Size(out); size > 3<<20 {
		t.Errorf("an answer of %d bytes", size)
	}
	told, left := 0, 0
	for _, s := range out.Snapshotters {
		told += len(s.Snapshots)
		left += int(s.LeftOut)
	}
	if told == 0 || told+left != 2*count {
		t.Errorf("%d snapshots told, %d left out, of %d", told, left, 2*count)
	}
}
