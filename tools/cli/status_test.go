package cli

import (
	"bytes"
	"testing"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

func TestPrintStatus(t *testing.T) {
	st := nodeStatus{
		Stats: &api.NodeStatsResponse{Images: 2, Sandboxes: 1, RegistryBytes: 3 << 20, RelayBytes: 1 << 19},
		Snapshotters: []*api.SnapshotterStatus{{
			Name: "tatami", Mode: "guest", Socket: "/run/t.sock", LazyLayers: 7,
			Snapshots: []*api.SnapshotStatus{
				{Key: "k8s.io/9/c1", Kind: "active", Mode: "guest", Reference: "docker.io/library/debian:12", Class: "batch", ClassReason: "label a=b"},
				{Key: "k8s.io/5/sha256:1", Kind: "committed", Reason: "no\tsuch\nimage\x1b"},
			},
		}},
		Store:     &api.StoreStatus{Used: 7 << 20, Quota: 10 << 20, High: 9 << 20, Low: 8 << 20, Pinned: 1 << 20, Evicted: 5 << 20, Pins: []string{"busybox:*", "a\x1bb"}},
		Sandboxes: []*api.SandboxStatus{{Id: "s1", Identity: "vsock:2110"}, {Id: "s2", Identity: "vsock:2110", VirtioFs: "connected", Containers: []*api.ContainerStatus{{Id: "c1", Reference: "debian", Class: "online", ClassReason: "label\na=b"}}}},
		Schedule: &api.ScheduleStatus{
			Classes: []*api.ClassStatus{
				{Name: "online", Share: 95, Percent: 95, Fill: "full", Containers: 1, Hits: 9, Misses: 2, WaitUs: 3000, Promoted: 1}, {Name: "batch", Share: 5, Percent: 5, Floor: "20%", Ceiling: "50 MB/s", Fill: "none"},
			},
			Queues: []*api.QueueStatus{
				{Name: "link", Rate: 4 << 20, Limit: 8 << 20, Classes: []*api.QueueClassStatus{
					{Class: "online", Total: 3 << 20, Rate: 3 << 20, Promoted: 1}, {Class: "batch", Total: 1 << 20, Rate: 1 << 20, Demand: 4, Prefetch: 2, OldestUs: 1500, Waits: 10, WaitedUs: 20000},
				}},
				{Name: "cpu", Turns: true, Limit: 2, Classes: []*api.QueueClassStatus{{Class: "online", Total: 1_500_000}, {Class: "batch"}}},
			},
		},
	}
	const want = `images 2, sandboxes 1, from registries 3.0 MiB, to sandboxes 0.5 MiB
store 7.0 MiB of 10.0 MiB (makes way above 9.0 MiB, down to 8.0 MiB), pinned 1.0 MiB, given up 5.0 MiB, not kept 0.0 MiB
pinned: busybox:*
pinned: a b

CLASS   SHARE     FLOOR  CEILING  FILL  CONTAINERS  HITS  MISSES  MEAN WAIT  PROMOTED
online  95 (95%)  -      -        full  1           9     2       1.5ms      1
batch   5 (5%)    20%    50 MB/s  none  0           0     0       0s         0
classes do not count: [schedule] is off, first come is first served

QUEUE  AT MOST    CLASS   NOW        OF ALL  SINCE START  WAITING  OLDEST  WAITS  MEAN WAIT  PROMOTED
link   8.0 MiB/s  online  3.0 MiB/s  75%     3.0 MiB      0+0+0    0s      0      0s         1
link   8.0 MiB/s  batch   1.0 MiB/s  25%     1.0 MiB      4+2+0    1.5ms   10     2ms        0
cpu    2 turns    online  0 turns    -       1.5s         0+0+0    0s      0      0s         0

SNAPSHOTTER  MODE   LAZY LAYERS  SOCKET
tatami       guest  7            /run/t.sock

SNAPSHOT           KIND       MODE   IMAGE                        CLASS  BECAUSE    REASON
k8s.io/9/c1        active     guest  docker.io/library/debian:12  batch  label a=b  
k8s.io/5/sha256:1  committed  full   -                            -      -          no such image 

SANDBOX  MACHINE     VIRTIO-FS  CONTAINER  IMAGE   CLASS   BECAUSE
s1       vsock:2110  -                                     
s2       vsock:2110  connected                             
                                c1         debian  online  label a=b
`
	var got bytes.Buffer
	if err := st.print(&got); err != nil || got.String() != want {
		t.Errorf("printed (%v)\n%s", err, got.String())
	}
}
