package shim

import (
	"encoding/base64"
	"os"
	"path/filepath"
	"reflect"
	"testing"

	"github.com/tatami-containers/tatami/tests/katavm/kata"
)

var annotations = map[string]string{kata.ContainerType: "container", kata.ImageName: "registry.example/app:1"}

func volume(json string) []Mount {
	return []Mount{{Type: "fuse./opt/x/nydus-overlayfs-x", Source: "overlay",
		Options: []string{"lowerdir=/l", volumeOption + base64.StdEncoding.EncodeToString([]byte(json))}}}
}

// TestGuestPull: the image is that of the annotation, the annotations join the
// volume's metadata.
func TestGuestPull(t *testing.T) {
	r, err := newRootfs("c1", volume(`{"volume_type":"image_guest_pull","source":"dummy","image_pull":{"metadata":{"a":"b"}}}`), annotations)
	if err != nil {
		t.Fatal(err)
	}
	want := kata.Storage{Driver: "image_guest_pull", Source: "registry.example/app:1", FSType: "overlay", MountPoint: "/run/kata-containers/c1/rootfs",
		DriverOptions: []string{`image_guest_pull={"metadata":{"a":"b","io.kubernetes.cri.container-type":"container","io.kubernetes.cri.image-name":"registry.example/app:1"}}`}}
	if len(r.storages) != 1 || !reflect.DeepEqual(r.storages[0], want) || len(r.disks) != 0 {
		t.Errorf("storages %+v, disks %v", r.storages, r.disks)
	}
	r, err = newRootfs("s1", volume(`{"volume_type":"image_guest_pull","source":"dummy"}`), map[string]string{kata.ContainerType: "sandbox", kata.ImageName: "x"})
	if err != nil || r.storages[0].Source != "pause" {
		t.Errorf("sandbox: %+v, %v", r, err)
	}
}

// TestBlock: disks as they are, in the order of the mounts, and what the agent
// needs to know of them.
func TestBlock(t *testing.T) {
	image := filepath.Join(t.TempDir(), "image.erofs")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	overlay := Mount{Type: "format/mkdir/overlay", Source: "overlay",
		Options: []string{"X-containerd.mkdir.path={{ mount 0 }}/upper:0755", "lowerdir={{ mount 1 }}"}}
	r, err := newRootfs("c1", []Mount{{Type: "ext4", Source: "/rw.img", Options: []string{"rw", "loop"}},
		{Type: "erofs", Source: image, Options: []string{"ro", "loop"}}, overlay}, annotations)
	if err != nil {
		t.Fatal(err)
	}
	const at = "/run/kata-containers/shared/containers/passthrough/c1/rootfs"
	want := []kata.Storage{
		{Driver: "blk", FSType: "ext4", MountPoint: at, Options: []string{"rw", "X-kata.overlay-upper", "X-kata.multi-layer=true"}},
		{Driver: "blk", FSType: "erofs", MountPoint: at, Options: []string{"ro", "X-kata.overlay-lower", "X-kata.multi-layer=true", "X-kata.mkdir.path={{ mount 0 }}/upper:0755"}},
	}
	if !reflect.DeepEqual(r.storages, want) || !reflect.DeepEqual(r.disks, []disk{{"/rw.img", false}, {image, true}}) {
		t.Errorf("storages %+v, disks %v", r.storages, r.disks)
	}
}

func TestRefusedRootfs(t *testing.T) {
	overlay := Mount{Type: "overlay", Source: "overlay"}
	for _, c := range []struct {
		name   string
		mounts []Mount
	}{
		{"nothing", nil},
		{"a mount for a shared file system", []Mount{overlay}},
		{"two overlays", []Mount{overlay, overlay}},
		{"no base64", []Mount{{Options: []string{volumeOption + "?"}}}},
		{"another volume", volume(`{"volume_type":"image_raw_block","source":"a"}`)},
		{"volume without a source", volume(`{"volume_type":"image_guest_pull"}`)},
		{"EROFS that is no file", []Mount{{Type: "erofs", Source: "/dev"}, overlay}},
	} {
		t.Run(c.name, func(t *testing.T) {
			if r, err := newRootfs("c1", c.mounts, annotations); err == nil {
				t.Errorf("accepted: %+v", r)
			}
		})
	}
	if _, err := newRootfs("c1", volume(`{"volume_type":"image_guest_pull","source":"a"}`), nil); err == nil {
		t.Error("accepted without an image's name")
	}
}
