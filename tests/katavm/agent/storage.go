package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/imageservice/cdh"
	"github.com/tatami-containers/tatami/tests/katavm/extension"
	"github.com/tatami-containers/tatami/tests/katavm/kata"
)

// imagePullTimeout is DEFAULT_IMAGE_PULL_TIMEOUT of src/agent/src/config.rs.
const imagePullTimeout = 1200 * time.Second

// addStorages is add_storages of src/agent/src/storage/mod.rs for the two kinds
// of storage that a container's root file system has here. It returns what is to
// be cleaned up when the container goes, in that order.
func (a *agent) addStorages(ctx context.Context, id string, storages []kata.Storage) ([]string, error) {
	var mounts []string
	for i, s := range storages {
		var paths []string
		var err error
		switch {
		case isMultiLayer(s) && i > 0:
			continue // the first one has done it for all
		case isMultiLayer(s):
			paths, err = multiLayer(ctx, id, storages)
		case s.Driver == kata.GuestPull:
			paths, err = a.guestPull(ctx, id, s)
		default:
			err = fmt.Errorf("failed to find the storage handler %s", s.Driver)
		}
		if err != nil {
			return nil, err
		}
		mounts = append(mounts, paths...)
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, m := range mounts {
		a.storages[m] = true
	}
	return mounts, nil
}

// guestPull is create_device of src/agent/src/storage/image_pull_handler.rs.
func (a *agent) guestPull(ctx context.Context, id string, s kata.Storage) ([]string, error) {
	info, err := imagePull(s)
	if err != nil {
		return nil, err
	}
	bundle := filepath.Join(kata.ContainerBase, id)
	rootfs := filepath.Join(bundle, "rootfs")
	if isSandbox(info.Metadata) {
		return []string{rootfs}, a.unpackPause(bundle)
	}
	if err := os.MkdirAll(bundle, 0o755); err != nil {
		return nil, err
	}
	if a.cdh == nil {
		return nil, errors.New("Confidential Data Hub not initialized") //nolint:staticcheck // upstream's panic
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), imagePullTimeout)
	defer cancel()
	if _, err := a.cdh.PullImage(ctx, &cdh.ImagePullRequest{ImageUrl: s.Source, BundlePath: bundle}); err != nil {
		return nil, err
	}
	// Upstream uses whatever it finds; a directory would be left over on removal.
	if !isMounted(rootfs) {
		return nil, fmt.Errorf("%s is no mount point after PullImage", rootfs)
	}
	return []string{rootfs}, nil
}

func imagePull(s kata.Storage) (kata.ImagePull, error) {
	for _, option := range s.DriverOptions {
		if value, ok := strings.CutPrefix(option, kata.GuestPull+"="); ok {
			var info kata.ImagePull
			err := json.Unmarshal([]byte(value), &info)
			return info, err
		}
	}
	return kata.ImagePull{}, errors.New("missing Image information for ImagePull volume")
}

func isSandbox(annotations map[string]string) bool {
	return annotations[kata.ContainerType] == "sandbox"
}

// unpackPause is unpack_pause_image of src/agent/src/confidential_data_hub/image.rs:
// two files are copied, the configuration and the program.
func (a *agent) unpackPause(bundle string) error {
	from, spec, err := a.pause()
	if err != nil {
		return err
	}
	program := strings.TrimPrefix(spec.Process.Args[0], "/")
	for _, name := range []string{"config.json", filepath.Join("rootfs", program)} {
		if err := copyFile(filepath.Join(from, name), filepath.Join(bundle, name)); err != nil {
			return err
		}
	}
	return nil
}

// pause reads the pause bundle of the extension (get_pause_image_process).
func (a *agent) pause() (dir string, spec *specs.Spec, err error) {
	if a.extension == nil {
		return "", nil, errors.New("Pause image not present in rootfs") //nolint:staticcheck // upstream's words
	}
	if dir, err = a.extension.Component(extension.PauseBundle); err != nil {
		return "", nil, err
	}
	b, err := os.ReadFile(filepath.Join(dir, "config.json"))
	if err != nil {
		return "", nil, err
	}
	spec = new(specs.Spec)
	if err := json.Unmarshal(b, spec); err != nil {
		return "", nil, fmt.Errorf("load image config file: %w", err)
	}
	if spec.Process == nil || len(spec.Process.Args) == 0 || !strings.HasPrefix(spec.Process.Args[0], "/") {
		return "", nil, errors.New("the pause image's config has no command with an absolute path")
	}
	return dir, spec, nil
}

// copyFile keeps the mode, as Rust's fs::copy does.
func copyFile(from, to string) error {
	b, err := os.ReadFile(from)
	if err != nil {
		return err
	}
	st, err := os.Stat(from)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(to), 0o755); err != nil {
		return err
	}
	return os.WriteFile(to, b, st.Mode().Perm())
}

// isMounted looks into mountinfo, as the agent's is_mounted does.
func isMounted(path string) bool {
	b, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return false
	}
	for line := range strings.Lines(string(b)) {
		if f := strings.Fields(line); len(f) > 4 && f[4] == path {
			return true
		}
	}
	return false
}

// cleanUp is StorageDeviceGeneric::cleanup of src/agent/src/storage/mod.rs.
func cleanUp(path string) error {
	if !exists(path) {
		return nil
	}
	if isMounted(path) {
		if err := unix.Unmount(path, 0); err != nil {
			return fmt.Errorf("failed to umount mountpoint %s: %w", path, err)
		}
	}
	left, err := os.ReadDir(path)
	if err != nil {
		return err
	}
	if len(left) > 0 {
		return errors.New("directory is not empty when clean up storage " + path)
	}
	_ = os.Remove(path) // upstream ignores it, too
	return nil
}
