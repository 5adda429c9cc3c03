package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/tests/katavm/extension"
)

// diskWait bounds how long a disk or a partition may take to appear.
const diskWait = 5 * time.Second

// mountExtension does what src/agent/kata-extension-mount.sh does: the disk with
// the serial extension-<name>, verified if it has a second partition, read-only
// at /run/kata-extensions/<name>. A verified image without parameters is refused,
// and so are parameters for an image that cannot be verified.
func mountExtension(ctx context.Context, name, params string) error {
	disk, err := diskBySerial(ctx, "extension-"+name)
	if err != nil {
		return err
	}
	source, err := extensionSource(disk, name, params)
	if err != nil {
		return err
	}
	dir := filepath.Join(extension.Root, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := unix.Mount(source, dir, "erofs", unix.MS_RDONLY, ""); err != nil {
		return fmt.Errorf("mount %s: %w", source, err)
	}
	return nil
}

func extensionSource(disk, name, params string) (string, error) {
	data, hash := partition(disk, 1), partition(disk, 2)
	switch {
	case exists(hash) && params == "":
		return "", errors.New("the image has a hash partition and the command line no verity_params")
	case exists(hash):
		return openVerity("extension-"+name, data, hash, params)
	case params != "":
		return "", errors.New("the command line has verity_params and the image no hash partition")
	case exists(data):
		return data, nil
	}
	return disk, nil
}

// partition is the device of a partition, whether it exists or not.
func partition(disk string, n int) string {
	if last := disk[len(disk)-1]; last >= '0' && last <= '9' {
		disk += "p"
	}
	return fmt.Sprintf("%s%d", disk, n)
}

// diskBySerial looks at /sys/block/*/serial until the disk is there: without
// udev nothing tells when the kernel has found it.
func diskBySerial(ctx context.Context, serial string) (string, error) {
	return poll(ctx, func() (string, error) {
		files, err := filepath.Glob("/sys/block/*/serial")
		if err != nil {
			return "", err
		}
		for _, f := range files {
			if b, err := os.ReadFile(f); err == nil && strings.TrimRight(string(b), "\n\x00") == serial {
				return "/dev/" + filepath.Base(filepath.Dir(f)), nil
			}
		}
		return "", fmt.Errorf("no disk with the serial %s", serial)
	})
}

// poll calls try until it succeeds, at most for diskWait.
func poll(ctx context.Context, try func() (string, error)) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, diskWait)
	defer cancel()
	for {
		found, err := try()
		if err == nil {
			return found, nil
		}
		select {
		case <-ctx.Done():
			return "", err
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}
