// Package volume is Kata's virtual-volume record, which travels from a
// snapshotter to Kata's runtime in an option of a mount:
//
//	io.katacontainers.volume=<base64 of JSON>
//
// The record is Kata's (kata-containers 4.1: src/runtime/virtcontainers/types/
// virtual_volume.go, src/libs/kata-types/src/mount.rs). What this package
// accepts, both of Kata's runtimes accept. It does no I/O.
package volume

import (
	"bytes"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
)

// Prefix begins the mount option (VirtualVolumePrefix in Kata's
// fs_share_linux.go, KATA_VIRTUAL_VOLUME_PREFIX in mount.rs).
const Prefix = "io.katacontainers.volume="

// maxOption bounds an option in bytes; one with the annotations of a pod, which
// the API server bounds to 256 KiB, fits.
const maxOption = 1 << 20

// Type says what a volume is and which of its fields count.
type Type string

// All types of Kata. Its runtimes act on GuestPull alone; the others are
// defined and checked, no more.
const (
	DirectBlock     Type = "direct_block"
	ImageRawBlock   Type = "image_raw_block"
	LayerRawBlock   Type = "layer_raw_block"
	ImageNydusBlock Type = "image_nydus_block"
	LayerNydusBlock Type = "layer_nydus_block"
	ImageNydusFS    Type = "image_nydus_fs"
	LayerNydusFS    Type = "layer_nydus_fs"
	GuestPull       Type = "image_guest_pull"
)

// Volume is one record.
type Volume struct {
	Type    Type     `json:"volume_type"`
	Source  string   `json:"source,omitempty"`  // a path on the host; an image reference for GuestPull
	FSType  string   `json:"fs_type,omitempty"` // of the file system in Source
	Options []string `json:"options,omitempty"` // for mounting it

	Direct    *Metadata   `json:"direct_volume,omitempty"`
	ImagePull *Metadata   `json:"image_pull,omitempty"`
	Nydus     *NydusImage `json:"nydus_image,omitempty"`
	Verity    *Verity     `json:"dm_verity,omitempty"`
}

// Metadata is for the agent. It is written also when it is empty, because the
// Go runtime stores into it without looking (kata_agent.go,
// handleImageGuestPullBlockVolume).
type Metadata struct {
	Metadata map[string]string `json:"metadata"`
}

// NydusImage says how a Nydus image is served.
type NydusImage struct {
	Config      string `json:"config"`
	SnapshotDir string `json:"snapshot_dir"`
}

// Verity describes a dm-verity hash tree over Source.
type Verity struct {
	Algorithm     string `json:"hashtype"`  // "sha256" or "sha1"
	RootHash      string `json:"hash"`      // hex
	DataBlocks    uint64 `json:"blocknum"`  // count
	DataBlockSize uint64 `json:"blocksize"` // bytes
	HashBlockSize uint64 `json:"hashsize"`  // bytes
	Offset        uint64 `json:"offset"`    // of the tree, in bytes

	// Only runtime-rs reads these.
	Salt         string  `json:"salt,omitempty"`          // hex
	Format       *uint32 `json:"hash_type,omitempty"`     // 0 or 1; 1 when nil
	NoSuperblock bool    `json:"no_superblock,omitempty"` // the tree begins at Offset itself
}

// NewGuestPull is the record that makes the guest pull the image. Both runtimes
// replace ref by the image name among the container's annotations, but want one.
func NewGuestPull(ref string) *Volume {
	return &Volume{Type: GuestPull, Source: ref, ImagePull: &Metadata{Metadata: map[string]string{}}}
}

// Option encodes the record as a mount option. ErrInvalidArgument when Kata
// would refuse it.
func (v *Volume) Option() (string, error) {
	if err := v.Validate(); err != nil {
		return "", err
	}
	text, err := json.Marshal(v)
	if err != nil {
		return "", err
	}
	option := Prefix + base64.StdEncoding.EncodeToString(text)
	if len(option) > maxOption {
		return "", fmt.Errorf("the volume takes %d bytes as a mount option, more than %d: %w", len(option), maxOption, errdefs.ErrInvalidArgument)
	}
	return option, nil
}

// Decode reads a mount option. ErrNotFound when the option is another one,
// ErrInvalidArgument when Kata would refuse it. Unknown fields are passed over, as
// Kata does.
func Decode(option string) (*Volume, error) {
	encoded, ok := strings.CutPrefix(option, Prefix)
	if !ok {
		return nil, fmt.Errorf("mount option does not begin with %q: %w", Prefix, errdefs.ErrNotFound)
	}
	if len(option) > maxOption {
		return nil, fmt.Errorf("volume option of %d bytes, more than %d: %w", len(option), maxOption, errdefs.ErrInvalidArgument)
	}
	// Go's decoder passes over line breaks, Rust's refuses them.
	if strings.ContainsAny(encoded, "\r\n") {
		return nil, fmt.Errorf("volume option with line breaks: %w", errdefs.ErrInvalidArgument)
	}
	text, err := base64.StdEncoding.Strict().DecodeString(encoded)
	if err != nil {
		return nil, fmt.Errorf("volume option: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	v, err := parse(text)
	if err != nil {
		return nil, err
	}
	return v, v.Validate()
}

func parse(text []byte) (*Volume, error) {
	v := new(Volume)
	d := json.NewDecoder(bytes.NewReader(text))
	if err := d.Decode(v); err != nil {
		return nil, fmt.Errorf("volume record: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, fmt.Errorf("volume record: more text after it: %w", errdefs.ErrInvalidArgument)
	}
	return v, nil
}

// Find returns the one volume among a mount's options. ErrNotFound when there
// is none; runtime-rs accepts only one (virtual_volume.rs).
func Find(options []string) (*Volume, error) {
	isVolume := func(o string) bool { return strings.HasPrefix(o, Prefix) }
	i := slices.IndexFunc(options, isVolume)
	if i < 0 {
		return nil, fmt.Errorf("no volume among the mount options: %w", errdefs.ErrNotFound)
	}
	if slices.ContainsFunc(options[i+1:], isVolume) {
		return nil, fmt.Errorf("more than one volume among the mount options: %w", errdefs.ErrInvalidArgument)
	}
	return Decode(options[i])
}
