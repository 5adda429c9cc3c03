package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/tests/katavm/kata"
)

// This file follows src/agent/src/storage/multi_layer_erofs.rs for disks without
// partitions.

func isMultiLayer(s kata.Storage) bool { return slices.Contains(s.Options, kata.MultiLayer) }

// multiLayer mounts the group of storages of one container: EROFS disks, an
// optional ext4 disk for writes, an overlay at the mount point of the upper (of
// the first lower without one).
func multiLayer(ctx context.Context, id string, storages []kata.Storage) ([]string, error) {
	upper, lowers, err := layers(storages)
	if err != nil {
		return nil, err
	}
	target := lowers[0].MountPoint
	base := filepath.Join(kata.ContainerBase, id, "multi-layer")
	upperDir := filepath.Join(base, "upper")
	if err := os.MkdirAll(upperDir, 0o755); err != nil {
		return nil, err
	}
	var backing, lowerDirs []string
	if upper != nil {
		target = upper.MountPoint
		if err := mountLayer(ctx, *upper, upperDir); err != nil {
			return nil, err
		}
		backing = append(backing, upperDir)
	}
	if err := makeDirectories(storages, upperDir); err != nil {
		return nil, err
	}
	for i, s := range lowers {
		dir := filepath.Join(base, fmt.Sprintf("lower-%d", i))
		if err := mountLayer(ctx, s, dir); err != nil {
			return nil, err
		}
		lowerDirs = append(lowerDirs, dir)
	}
	if err := mountOverlay(target, upperDir, lowerDirs); err != nil {
		return nil, err
	}
	return slices.Concat([]string{target}, backing, lowerDirs), nil
}

func layers(storages []kata.Storage) (upper *kata.Storage, lowers []kata.Storage, err error) {
	for _, s := range storages {
		isUpper := slices.Contains(s.Options, kata.OverlayUpper)
		switch {
		case isUpper && s.FSType != "ext4":
			return nil, nil, fmt.Errorf("multi-layer erofs explicit upper layer must be ext4, got %q", s.FSType)
		case isUpper && upper != nil:
			return nil, nil, errors.New("multi-layer erofs currently supports exactly one explicit ext4 upper layer")
		case isUpper:
			upper = &s
		case slices.Contains(s.Options, kata.OverlayLower):
			lowers = append(lowers, s)
		}
	}
	if len(lowers) == 0 {
		return nil, nil, errors.New("multi-layer erofs missing erofs lower layer storage")
	}
	return upper, lowers, nil
}

// makeDirectories follows the X-kata.mkdir.path options, which are of the form
// "{{ mount 0 }}/name:mode", where mount 0 is the upper.
func makeDirectories(storages []kata.Storage, upperDir string) error {
	for _, s := range storages {
		for _, o := range s.Options {
			spec, ok := strings.CutPrefix(o, kata.MkdirPath)
			if !ok {
				continue
			}
			path, _, _ := strings.Cut(spec, ":")
			rel, ok := strings.CutPrefix(path, "{{ mount 0 }}/")
			if !ok || !filepath.IsLocal(rel) {
				return fmt.Errorf("mkdir path %q is not below the upper", path)
			}
			if err := os.MkdirAll(filepath.Join(upperDir, rel), 0o755); err != nil {
				return err
			}
		}
	}
	return nil
}

// mountLayer is wait_and_mount_layer: EROFS with "ro" alone, others with the
// storage's options.
func mountLayer(ctx context.Context, s kata.Storage, dir string) error {
	if s.Driver != kata.BlockPCI {
		return fmt.Errorf("unsupported driver type %q for multi-layer erofs", s.Driver)
	}
	dev, err := diskAtPCI(ctx, s.Source)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	flags := uintptr(unix.MS_RDONLY)
	if s.FSType != "erofs" {
		if flags, err = mountFlags(s.Options); err != nil {
			return err
		}
	}
	if err := unix.Mount(dev, dir, s.FSType, flags, ""); err != nil {
		return fmt.Errorf("failed to mount layer %s (%s): %w", s.Source, s.FSType, err)
	}
	return nil
}

// mountFlags knows what snapshotters give an upper.
func mountFlags(options []string) (uintptr, error) {
	var flags uintptr
	for _, o := range options {
		switch {
		case o == "ro":
			flags |= unix.MS_RDONLY
		case o == "rw", strings.HasPrefix(o, "X-kata."):
		default:
			return 0, fmt.Errorf("mount option %q", o)
		}
	}
	return flags, nil
}

// diskAtPCI waits for the disk at a path of slots, "02/00" for slot 0 behind the
// bridge in slot 2 (src/agent/src/device/block_device_handler.rs,
// get_virtio_blk_pci_device_name; src/agent/src/pci.rs).
func diskAtPCI(ctx context.Context, path string) (string, error) {
	pattern := "/sys/devices/pci0000:00"
	for _, slot := range strings.Split(path, "/") {
		pattern = filepath.Join(pattern, "0000:??:"+slot+".0")
	}
	return poll(ctx, func() (string, error) {
		found, err := filepath.Glob(filepath.Join(pattern, "virtio*", "block", "*"))
		if err != nil {
			return "", err
		}
		if len(found) != 1 {
			return "", fmt.Errorf("no disk at PCI path %s", path)
		}
		// The agent waits for the kernel's event; before that, opening fails.
		dev := filepath.Join("/dev", filepath.Base(found[0]))
		f, err := os.Open(dev)
		if err != nil {
			return "", err
		}
		return dev, f.Close()
	})
}

func mountOverlay(target, upperDir string, lowerDirs []string) error {
	upper, work := filepath.Join(upperDir, "upper"), filepath.Join(upperDir, "work")
	for _, dir := range []string{upper, work, target} {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
	}
	options := fmt.Sprintf("upperdir=%s,lowerdir=%s,workdir=%s", upper, strings.Join(lowerDirs, ":"), work)
	if err := unix.Mount("overlay", target, "overlay", 0, options); err != nil {
		return fmt.Errorf("failed to mount overlay: %w", err)
	}
	return nil
}
