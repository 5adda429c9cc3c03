package vm

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/errdefs"
)

// Kernel is a bootable kernel with its modules.
type Kernel struct {
	Image   string // path of the bzImage
	Release string // as uname -r prints it
	Modules string // its /lib/modules/<release>, wherever that lies
}

// FindKernel finds a kernel: the one at path; when path is empty, the newest in
// /boot, else the newest that FetchKernel has put in the cache. ErrNotFound says
// how to get one.
func FindKernel(path string) (Kernel, error) {
	if path != "" {
		return openKernel(path)
	}
	cache, err := CacheDir()
	if err != nil {
		return Kernel{}, err
	}
	for _, pattern := range []string{"/boot/vmlinuz-*", filepath.Join(cache, "kernel", "*", "boot", "vmlinuz-*")} {
		if k, ok := newestKernel(pattern); ok {
			return k, nil
		}
	}
	return Kernel{}, fmt.Errorf("find a guest kernel: %w in /boot or %s: name one, install one, "+
		"or run `go run github.com/tatami-containers/tatami/tools/vm/cmd/fetch-kernel`", errdefs.ErrNotFound, filepath.Join(cache, "kernel"))
}

// newestKernel is the usable kernel with the highest release. One that cannot be
// used (no modules, another machine's) is passed over.
func newestKernel(pattern string) (Kernel, bool) {
	names, err := filepath.Glob(pattern)
	if err != nil {
		return Kernel{}, false // a mistake in the pattern only
	}
	var found []Kernel
	for _, name := range names {
		if k, err := openKernel(name); err == nil {
			found = append(found, k)
		}
	}
	if len(found) == 0 {
		return Kernel{}, false
	}
	return slices.MaxFunc(found, func(a, b Kernel) int { return compareReleases(a.Release, b.Release) }), true
}

func openKernel(path string) (Kernel, error) {
	path, err := filepath.Abs(path)
	if err != nil {
		return Kernel{}, err
	}
	f, err := os.Open(path)
	if err != nil {
		return Kernel{}, fmt.Errorf("open guest kernel: %w", err)
	}
	defer f.Close()
	k := Kernel{Image: path}
	if k.Release, err = readRelease(f); err != nil {
		return Kernel{}, fmt.Errorf("read guest kernel %s: %w", path, err)
	}
	root := filepath.Dir(filepath.Dir(path)) // above boot
	dirs := []string{filepath.Join(root, "lib/modules"), filepath.Join(root, "usr/lib/modules"), "/lib/modules"}
	for _, dir := range dirs {
		k.Modules = filepath.Join(dir, k.Release)
		if _, err := os.Stat(k.Modules); err == nil {
			return k, nil
		}
	}
	return Kernel{}, fmt.Errorf("modules of guest kernel %s: %w: no %s in %s", path, errdefs.ErrNotFound, k.Release, strings.Join(dirs, ", "))
}

// readRelease reads the release out of a bzImage (Documentation/arch/x86/boot.rst:
// magic "HdrS" at 0x202, kernel_version at 0x20e, an offset less 0x200).
func readRelease(r io.ReaderAt) (string, error) {
	var h [0x10]byte
	if _, err := r.ReadAt(h[:], 0x200); err != nil {
		return "", err
	}
	if string(h[2:6]) != "HdrS" {
		return "", fmt.Errorf("%w: not an x86 bzImage", errdefs.ErrInvalidArgument)
	}
	text := make([]byte, 256)
	n, err := r.ReadAt(text, int64(binary.LittleEndian.Uint16(h[0xe:]))+0x200)
	if err != nil && !errors.Is(err, io.EOF) {
		return "", err
	}
	release, _, ok := strings.Cut(string(text[:n]), " ")
	if !ok || release == "" || strings.ContainsAny(release, "/\x00") {
		return "", fmt.Errorf("%w: no release in the bzImage", errdefs.ErrInvalidArgument)
	}
	return release, nil
}

// compareReleases compares the numbers in two releases, one after another.
func compareReleases(a, b string) int {
	return slices.Compare(numbers(a), numbers(b))
}

func numbers(s string) []int {
	var out []int
	for _, f := range strings.FieldsFunc(s, func(r rune) bool { return r < '0' || r > '9' }) {
		n, err := strconv.Atoi(f)
		if err != nil {
			break // longer than any version
		}
		out = append(out, n)
	}
	return out
}

// CacheDir is where kernels and verdicts about this machine are kept:
// $XDG_CACHE_HOME/tatami, /var/cache/tatami for root, else ~/.cache/tatami.
func CacheDir() (string, error) {
	if os.Getenv("XDG_CACHE_HOME") == "" && os.Getuid() == 0 {
		return "/var/cache/tatami", nil
	}
	dir, err := os.UserCacheDir()
	if err != nil {
		return "", fmt.Errorf("find the cache directory: %w", err)
	}
	return filepath.Join(dir, "tatami"), nil
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return !errors.Is(err, fs.ErrNotExist)
}
