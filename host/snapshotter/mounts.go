package snapshotter

import (
	"strings"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/tatami-containers/tatami/protocols/volume"
)

// layout is all that a mount list is made of.
type layout struct {
	id     string
	kind   snapshots.Kind
	record record
	base   base
	given  given
	upper  bool // block mode has an image for writes
	unpack bool // containerd unpacks a layer in it
}

// mounts returns the mount list of a snapshot, by its mode.
func (s *Snapshotter) mounts(l layout) ([]mount.Mount, error) {
	switch l.record.mode {
	case Guest:
		return s.guestMounts(l)
	case Block:
		return s.blockMounts(l), nil
	case Nydus:
		return s.nydusMounts(l)
	default:
		return s.overlayMounts(l), nil
	}
}

// guestMounts is one mount with a volume record. Both of Kata's runtimes take the
// record and mount nothing: the Go runtime because of the type
// (IsNydusRootFSType in kata_agent.go, checkAndMount in create.go), runtime-rs
// because of the option where it has no shared file system (is_guest_pull_volume
// in rootfs/mod.rs). containerd itself runs the helper as mount.fuse does, to look
// up users; the rest of the options is an overlay for it.
func (s *Snapshotter) guestMounts(l layout) ([]mount.Mount, error) {
	// The runtimes put the image name of the container's annotations there.
	record, err := volume.NewGuestPull(l.record.chain.Reference).Option()
	if err != nil {
		return nil, err
	}
	lower := s.path(l.id, lowerLink)
	options := []string{"ro", "lowerdir=" + s.path(l.id, upperDir) + ":" + lower}
	if l.kind == snapshots.KindActive {
		options = append(s.writable(l.id), "lowerdir="+lower)
	}
	options = append(options, s.overlay...)
	return []mount.Mount{{Type: "fuse." + s.cfg.MountHelper, Source: "overlay", Options: append(options, record)}}, nil
}

// nydusMounts is one mount with the record that both of Kata's runtimes take, and
// mount nothing: they hand its source to their virtio-fs daemon and its directory to
// the guest (shareRootFilesystemWithNydus in fs_share_linux.go,
// create_standalone_rootfs in rootfs/nydus_rootfs.rs). The other options are for
// containerd, as in guest mode; what the VM writes is not there. A view, which has
// nothing to write, is a directory of the host that any runtime can share.
func (s *Snapshotter) nydusMounts(l layout) ([]mount.Mount, error) {
	if l.kind != snapshots.KindActive {
		return bind(l.given.lower, false), nil
	}
	// tatami-virtiofsd needs no configuration, and Kata takes no empty one.
	record, err := volume.Extra{Source: l.given.lower, Config: "{}", SnapshotDir: s.path(l.id, guestDir), FSVersion: volume.FSVersion}.Option()
	if err != nil {
		return nil, err
	}
	options := append(s.writable(l.id), "lowerdir="+s.path(l.id, lowerLink))
	options = append(options, s.overlay...)
	return []mount.Mount{{Type: volume.NydusType, Source: "overlay", Options: append(options, record)}}, nil
}

// writable are the overlay options of a snapshot's upper directory.
func (s *Snapshotter) writable(id string) []string {
	return []string{"workdir=" + s.path(id, workDir), "upperdir=" + s.path(id, upperDir)}
}

// blockMounts is a list as containerd's EROFS snapshotter makes it
// (overlayMounts in its plugins/snapshots/erofs/erofs.go), which runtime-rs
// turns into disks (is_erofs_multi_layer in rootfs/erofs_rootfs.rs): the ext4
// for writes, if there is one, the image, and an overlay whose text only
// containerd's mount manager reads. The image is one file, so it becomes a raw
// disk.
func (s *Snapshotter) blockMounts(l layout) []mount.Mount {
	image := mount.Mount{Type: "erofs", Source: l.given.file, Options: []string{"ro", "loop"}}
	overlay := mount.Mount{Type: "format/mkdir/overlay", Source: "overlay"}
	switch {
	case l.kind != snapshots.KindActive: // an overlay without an upper needs two lowers
		overlay.Options = []string{"ro", "lowerdir=" + s.path(l.id, upperDir) + ":{{ mount 0 }}"}
	case !l.upper:
		overlay.Options = append(s.writable(l.id), "lowerdir={{ mount 0 }}")
	default:
		upper := mount.Mount{Type: "ext4", Source: s.path(l.id, upperFile), Options: []string{"rw", "loop"}}
		overlay.Options = []string{
			"X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "X-containerd.mkdir.path={{ mount 0 }}/work:0755",
			"workdir={{ mount 0 }}/work", "upperdir={{ mount 0 }}/upper", "lowerdir={{ mount 1 }}",
		}
		overlay.Options = append(overlay.Options, s.overlay...)
		return []mount.Mount{upper, image, overlay}
	}
	overlay.Options = append(overlay.Options, s.overlay...)
	return []mount.Mount{image, overlay}
}

// overlayMounts is a list as containerd's overlayfs snapshotter makes it (mounts
// in its plugins/snapshots/overlay/overlay.go), with the node's mount as the
// lowest layer if there is one.
func (s *Snapshotter) overlayMounts(l layout) []mount.Mount {
	var lowers []string
	for _, id := range l.base.full {
		lowers = append(lowers, s.path(id, upperDir))
	}
	if l.given.lower != "" {
		lowers = append(lowers, s.lowerOption(l))
	}
	active := l.kind == snapshots.KindActive
	switch {
	case len(lowers) == 0:
		return bind(s.path(l.id, upperDir), active)
	case len(lowers) == 1 && !active && l.given.lower != "":
		return bind(l.given.lower, false)
	case len(lowers) == 1 && !active:
		return bind(lowers[0], false)
	}
	var options []string
	if active {
		options = s.writable(l.id)
	}
	options = append(options, "lowerdir="+strings.Join(lowers, ":"))
	return []mount.Mount{{Type: "overlay", Source: "overlay", Options: append(options, s.overlay...)}}
}

// lowerOption names the node's mount in an overlay option: by a link beside the
// other layers, because containerd and Kata shorten options beyond a page, those
// of many layers, by the directory that all layers are in; and with a backslash,
// which overlayfs takes out (Documentation/filesystems/overlayfs.rst). Under the
// name with the backslash stands a directory with the image's users, for those
// who take the option for a path: Kata's Go runtime looks at each lowerdir and
// takes one on EROFS for a disk that it must attach (IsErofsRootFS in
// kata_agent.go, createErofsDevices in container.go), and containerd 2.4 looks
// users up there without a mount (FSMounts in its internal/fsview). When
// containerd unpacks it reads the lower directories themselves, so there it gets
// the link.
func (s *Snapshotter) lowerOption(l layout) string {
	if l.unpack {
		return s.path(l.id, lowerLink)
	}
	return s.path(l.id, usersDir)
}

func bind(dir string, writable bool) []mount.Mount {
	access := "ro"
	if writable {
		access = "rw"
	}
	return []mount.Mount{{Type: "bind", Source: dir, Options: []string{access, "rbind"}}}
}
