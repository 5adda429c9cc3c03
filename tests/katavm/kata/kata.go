// Package kata has what the stand-ins for Kata's shim and Kata's agent say to
// each other. The real ones speak ttrpc (src/libs/protocols/protos/agent.proto
// of Kata 4.1.0); these speak JSON over HTTP on the same vsock port, with the
// fields of the real messages that image services depend on.
package kata

import "github.com/opencontainers/runtime-spec/specs-go"

// AgentPort is the agent's vsock port (src/libs/kata-types/src/config/default.rs,
// DEFAULT_AGENT_VSOCK_PORT).
const AgentPort = 1024

// ContainerBase is where the agent has its containers' bundles in the guest
// (src/agent/src/rpc.rs, CONTAINER_BASE).
const ContainerBase = "/run/kata-containers"

// Drivers of a Storage.
const (
	GuestPull = "image_guest_pull" // src/libs/kata-types/src/mount.rs, KATA_VIRTUAL_VOLUME_IMAGE_GUEST_PULL
	BlockPCI  = "blk"              // src/libs/kata-types/src/device.rs, DRIVER_BLK_PCI_TYPE
)

// Options of a Storage of an EROFS root file system
// (src/agent/src/storage/multi_layer_erofs.rs).
const (
	OverlayUpper = "X-kata.overlay-upper"
	OverlayLower = "X-kata.overlay-lower"
	MultiLayer   = "X-kata.multi-layer=true"
	MkdirPath    = "X-kata.mkdir.path="
)

// Annotations that containerd's CRI puts on every container
// (internal/cri/annotations).
const (
	ContainerType = "io.kubernetes.cri.container-type" // "sandbox" or "container"
	ImageName     = "io.kubernetes.cri.image-name"
	SandboxID     = "io.kubernetes.cri.sandbox-id"
)

// Storage is a mount that the agent is asked for (agent.proto, Storage).
type Storage struct {
	Driver        string   `json:"driver"`
	DriverOptions []string `json:"driver_options,omitempty"`
	Source        string   `json:"source"`
	FSType        string   `json:"fstype"`
	Options       []string `json:"options,omitempty"`
	MountPoint    string   `json:"mount_point"`
}

// ImagePull is the value of the driver option of a GuestPull storage
// (src/libs/kata-types/src/mount.rs, ImagePullVolume).
type ImagePull struct {
	Metadata map[string]string `json:"metadata"`
}

// Paths of the agent's calls, all POST.
const (
	PathCreate = "/create" // CreateRequest, no answer
	PathStart  = "/start"  // ContainerRequest, no answer
	PathWait   = "/wait"   // ContainerRequest, Output
	PathRemove = "/remove" // ContainerRequest, no answer
	PathShell  = "/shell"  // ShellRequest, Output: a look at the guest, which the real agent does not give
)

// CreateRequest is CreateContainerRequest.
type CreateRequest struct {
	ContainerID string      `json:"container_id"`
	Storages    []Storage   `json:"storages"`
	OCI         *specs.Spec `json:"oci"`
}

// ContainerRequest names a container.
type ContainerRequest struct {
	ContainerID string `json:"container_id"`
}

// ShellRequest is a script for the guest's own shell.
type ShellRequest struct {
	Script string `json:"script"`
}

// Output is what a process wrote, and its exit code.
type Output struct {
	Stdout []byte `json:"stdout"`
	Stderr string `json:"stderr"`
	Code   int    `json:"code"`
}
