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
				{Key: "k8s.io/9/c1", Kind: "active", Mode: "guest", Reference: "docker.io/library/debian:12"},
				{Key: "k8s.io/5/sha256:1", Kind: "committed", Reason: "no\tsuch\nimage\x1b"},
			},
		}},
		Store:     &api.StoreStatus{Used: 7 << 20, Quota: 10 << 20, High: 9 << 20, Low: 8 << 20, Pinned: 1 << 20, Evicted: 5 << 20, Pins: []string{"busybox:*", "a\x1bb"}},
		Sandboxes: []*api.SandboxStatus{{Id: "s1", Identity: "vsock:2110"}, {Id: "s2", Identity: "vsock:2110", VirtioFs: "connected", Containers: []*api.ContainerStatus{{Id: "c1", Reference: "debian", Class: "online"}}}},
	}
	const want = `images 2, sandboxes 1, from registries 3.0 MiB, to sandboxes 0.5 MiB
store 7.0 MiB of 10.0 MiB (makes way above 9.0 MiB, down to 8.0 MiB), pinned 1.0 MiB, given up 5.0 MiB, not kept 0.0 MiB
pinned: busybox:*
pinned: a b

SNAPSHOTTER  MODE   LAZY LAYERS  SOCKET
tatami       guest  7            /run/t.sock

SNAPSHOT           KIND       MODE   IMAGE                        REASON
k8s.io/9/c1        active     guest  docker.io/library/debian:12  
k8s.io/5/sha256:1  committed  full   -                            no such image 

SANDBOX  MACHINE     VIRTIO-FS  CONTAINER  IMAGE   CLASS
s1       vsock:2110  -                             
s2       vsock:2110  connected                     
                                c1         debian  online
`
	var got bytes.Buffer
	if err := st.print(&got); err != nil || got.String() != want {
		t.Errorf("printed (%v)\n%s", err, got.String())
	}
}
