package shim

import (
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/tatami-containers/tatami/tests/katavm/kata"
)

// Mount is one of the mounts that a snapshotter returns for a container
// (containerd: api/types/mount.proto).
type Mount struct {
	Type, Source string
	Options      []string
}

// volumeOption carries a KataVirtualVolume, JSON in base64
// (src/libs/kata-types/src/mount.rs, KATA_VIRTUAL_VOLUME_PREFIX).
const volumeOption = "io.katacontainers.volume="

// guestShare is where the agent is asked to mount a root file system that is
// made of disks (src/runtime-rs/crates/resource/src/share_fs, do_get_guest_path).
const guestShare = kata.ContainerBase + "/shared/containers/passthrough"

// rootfs is what the shim makes of a mount list.
type rootfs struct {
	path     string // of the spec's root in the guest
	storages []kata.Storage
	disks    []disk // of the storages, in their order; none for guest pull
}

// disk is a file that becomes a virtio-blk device.
type disk struct {
	file     string
	readOnly bool
}

// newRootfs does what handler_rootfs of src/runtime-rs/crates/resource/src/
// rootfs/mod.rs does without a shared file system. What it cannot do is an error.
func newRootfs(id string, mounts []Mount, annotations map[string]string) (*rootfs, error) {
	if isMultiLayer(mounts) {
		return multiLayer(id, mounts)
	}
	if len(mounts) != 1 {
		return nil, fmt.Errorf("unsupported rootfs mounts count %d", len(mounts))
	}
	for _, o := range mounts[0].Options {
		if volume, ok := strings.CutPrefix(o, volumeOption); ok {
			return guestPull(id, volume, annotations)
		}
	}
	return nil, fmt.Errorf("unsupported rootfs %v", mounts[0])
}

// guestPull is VirtualVolume of src/runtime-rs/crates/resource/src/rootfs/
// virtual_volume.rs: the reference comes from an annotation, the volume's source
// only has to be there (KataVirtualVolume::validate).
func guestPull(id, volume string, annotations map[string]string) (*rootfs, error) {
	b, err := base64.StdEncoding.DecodeString(volume)
	if err != nil {
		return nil, fmt.Errorf("decode KataVirtualVolume: %w", err)
	}
	var v struct {
		VolumeType string          `json:"volume_type"`
		Source     string          `json:"source"`
		ImagePull  *kata.ImagePull `json:"image_pull"`
	}
	if err := json.Unmarshal(b, &v); err != nil {
		return nil, fmt.Errorf("decode KataVirtualVolume: %w", err)
	}
	if v.VolumeType != kata.GuestPull || v.Source == "" {
		return nil, fmt.Errorf("virtual volume of type %q and source %q", v.VolumeType, v.Source)
	}
	reference, err := imageReference(annotations)
	if err != nil {
		return nil, err
	}
	info := kata.ImagePull{Metadata: map[string]string{}}
	if v.ImagePull != nil {
		for key, value := range v.ImagePull.Metadata {
			info.Metadata[key] = value
		}
	}
	for key, value := range annotations {
		info.Metadata[key] = value
	}
	option, err := json.Marshal(info)
	if err != nil {
		return nil, err
	}
	path := filepath.Join(kata.ContainerBase, id, "rootfs")
	return &rootfs{path: path, storages: []kata.Storage{{
		Driver: kata.GuestPull, DriverOptions: []string{kata.GuestPull + "=" + string(option)},
		Source: reference, FSType: "overlay", MountPoint: path,
	}}}, nil
}

// imageReference is get_image_reference.
func imageReference(annotations map[string]string) (string, error) {
	if annotations[kata.ContainerType] == "sandbox" {
		return "pause", nil
	}
	if name := annotations[kata.ImageName]; name != "" {
		return name, nil
	}
	return "", errors.New("no target image reference found")
}

// isMultiLayer is is_erofs_multi_layer of src/runtime-rs/crates/resource/src/
// rootfs/erofs_rootfs.rs.
func isMultiLayer(mounts []Mount) bool {
	erofs := slices.ContainsFunc(mounts, func(m Mount) bool { return m.Type == "erofs" })
	return len(mounts) >= 2 && erofs && slices.ContainsFunc(mounts, isOverlay)
}

func isOverlay(m Mount) bool {
	return slices.Contains([]string{"overlay", "format/overlay", "format/mkdir/overlay"}, m.Type)
}

// multiLayer is ErofsMultiLayerRootfs for one EROFS file, which is attached as it
// is, and an optional ext4 file. Of the overlay only the directories to make
// count: the agent makes up its own.
func multiLayer(id string, mounts []Mount) (*rootfs, error) {
	r := &rootfs{path: filepath.Join(guestShare, id, "rootfs")}
	var upper, lower *Mount
	var mkdir []string
	for i, m := range mounts {
		switch {
		case m.Type == "ext4":
			upper = &mounts[i]
		case m.Type == "erofs" && lower != nil:
			return nil, errors.New("several EROFS files need a partitioned VMDK, which this stand-in does not make")
		case m.Type == "erofs":
			lower = &mounts[i]
		case isOverlay(m):
			mkdir = append(mkdir, mkdirOptions(m.Options)...)
		}
	}
	if upper != nil {
		options := slices.DeleteFunc(slices.Clone(upper.Options), func(o string) bool { return o == "loop" })
		r.add(*upper, false, append(options, kata.OverlayUpper, kata.MultiLayer))
	}
	if st, err := os.Stat(lower.Source); err != nil || !st.Mode().IsRegular() {
		return nil, fmt.Errorf("EROFS device path is not a regular file: %s (%w)", lower.Source, err)
	}
	options := slices.DeleteFunc(slices.Clone(lower.Options), func(o string) bool {
		return o == "loop" || strings.HasPrefix(o, "X-kata.")
	})
	if slices.ContainsFunc(options, func(o string) bool { return strings.HasPrefix(o, "device=") }) {
		return nil, errors.New("several EROFS devices need a VMDK, which this stand-in does not make")
	}
	r.add(*lower, true, slices.Concat(options, []string{kata.OverlayLower, kata.MultiLayer}, mkdir))
	return r, nil
}

func mkdirOptions(options []string) []string {
	var out []string
	for _, o := range options {
		if spec, ok := strings.CutPrefix(o, "X-containerd.mkdir.path="); ok {
			out = append(out, kata.MkdirPath+spec)
		}
	}
	return out
}

// add adds a disk and its storage, whose source is known once it is attached.
func (r *rootfs) add(m Mount, readOnly bool, options []string) {
	r.disks = append(r.disks, disk{m.Source, readOnly})
	r.storages = append(r.storages, kata.Storage{Driver: kata.BlockPCI, FSType: m.Type, Options: options, MountPoint: r.path})
}
