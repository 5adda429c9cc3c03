package vminit

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"
)

const (
	modulesDir = "/lib/modules"
	orderFile  = "tatami.order"
)

// loadModules loads the kernel modules that the order file in dir lists, one
// path relative to dir a line, those that others need first. Without the file
// there is nothing to load. A module that the kernel refuses is a warning: a
// machine without a network card is no reason not to boot.
func loadModules(dir string, log *slog.Logger) error {
	order, err := os.ReadFile(filepath.Join(dir, orderFile))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(order)) {
		if !filepath.IsLocal(name) {
			return fmt.Errorf("%s: %q is not a path below %s", orderFile, name, dir)
		}
		if err := loadModule(filepath.Join(dir, name)); err != nil {
			log.Warn("kernel module not loaded", "module", name, "error", err)
		}
	}
	return nil
}

// loadModule loads one module and removes its file, which in an initramfs
// takes memory and has no further use.
func loadModule(path string) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.FinitModule(int(f.Fd()), "", 0); err != nil && !errors.Is(err, unix.EEXIST) {
		return err
	}
	return os.Remove(path)
}
