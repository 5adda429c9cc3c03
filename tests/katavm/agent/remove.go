package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/tests/katavm/kata"
)

// remove is do_remove_container of src/agent/src/rpc.rs: destroy, and only if
// that succeeds the container's storages.
func (a *agent) remove(_ context.Context, req kata.ContainerRequest) (none, error) {
	c, err := a.find(req.ContainerID)
	if err != nil {
		return none{}, err
	}
	if err := a.destroy(c); err != nil {
		return none{}, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	for _, m := range c.mounts {
		if !a.storages[m] {
			continue
		}
		delete(a.storages, m)
		if err := cleanUp(m); err != nil {
			a.log.Error("failed to unset_and_remove_sandbox_storage", "container", c.id, "error", err)
		}
	}
	delete(a.containers, c.id)
	return none{}, nil
}

// destroy is LinuxContainer::destroy of src/agent/rustjail/src/container.rs: the
// processes are killed, the root file system is detached even if it is in use,
// and the bundle is removed with all that is in it.
func (a *agent) destroy(c *container) error {
	a.mu.Lock()
	started := c.started
	c.started = true // too late to start it
	a.mu.Unlock()
	if started {
		run(runtime, "kill", c.id, "KILL") // it may have ended
		<-c.done
	}
	bundle := filepath.Join(kata.ContainerBase, c.id)
	rootfs := filepath.Join(bundle, "rootfs")
	if err := unix.Unmount(rootfs, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		return fmt.Errorf("umount %s: %w", rootfs, err)
	}
	return removeAll(bundle)
}

// removeAll is Rust's fs::remove_dir_all: unlike os.RemoveAll it ends with the
// first error.
func removeAll(dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		remove := os.Remove
		if e.IsDir() {
			remove = removeAll
		}
		if err := remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return os.Remove(dir)
}
