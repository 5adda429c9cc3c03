package vm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
)

// metaPackages name small kernels for virtual machines: Debian's, Ubuntu's. They
// depend on the package with the image.
var metaPackages = []string{"linux-image-cloud-amd64", "linux-image-virtual"}

// FetchKernel downloads the distribution's kernel for virtual machines with apt and
// unpacks it in the cache, without installing anything. It needs apt-get,
// apt-cache, dpkg and current package lists; no root.
func FetchKernel(ctx context.Context) (Kernel, error) {
	cache, err := CacheDir()
	if err != nil {
		return Kernel{}, err
	}
	pkgs, err := kernelPackages(ctx)
	if err != nil {
		return Kernel{}, fmt.Errorf("fetch a guest kernel: %w", err)
	}
	dir := filepath.Join(cache, "kernel", strings.TrimPrefix(pkgs[0], "linux-image-"))
	if !exists(dir) {
		if err := fetchPackages(ctx, dir, pkgs); err != nil {
			return Kernel{}, fmt.Errorf("fetch a guest kernel: %w", err)
		}
	}
	k, ok := newestKernel(filepath.Join(dir, "boot", "vmlinuz-*"))
	if !ok {
		return k, fmt.Errorf("fetch a guest kernel: %w in %s; remove the directory and try again", errdefs.ErrNotFound, dir)
	}
	return k, nil
}

// kernelPackages names the package with the image, and the one with its modules
// where that is another.
func kernelPackages(ctx context.Context) ([]string, error) {
	for _, meta := range metaPackages {
		images, err := dependencies(ctx, meta, "linux-image-")
		if err != nil {
			return nil, err
		}
		if len(images) == 0 {
			continue
		}
		modules, err := dependencies(ctx, images[0], "linux-modules-")
		return append(images[:1], modules...), err
	}
	return nil, fmt.Errorf("%w: apt knows none of %s; run apt-get update", errdefs.ErrNotFound, strings.Join(metaPackages, ", "))
}

// dependencies lists the packages with the prefix that pkg depends on; none when
// apt does not know pkg.
func dependencies(ctx context.Context, pkg, prefix string) ([]string, error) {
	out, err := exec.CommandContext(ctx, "apt-cache", "depends", "--important", pkg).Output()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var names []string
	for line := range strings.Lines(string(out)) {
		kind, name, _ := strings.Cut(strings.TrimSpace(line), ": ")
		if strings.HasSuffix(kind, "Depends") && strings.HasPrefix(name, prefix) {
			names = append(names, name)
		}
	}
	return names, nil
}

// fetchPackages fills dir, which appears whole or not at all.
func fetchPackages(ctx context.Context, dir string, pkgs []string) (err error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o755); err != nil {
		return err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".fetch-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	if err := run(ctx, tmp, "apt-get", append([]string{"download", "--quiet"}, pkgs...)...); err != nil {
		return err
	}
	debs, err := filepath.Glob(filepath.Join(tmp, "*.deb"))
	if err != nil {
		return err
	}
	root := filepath.Join(tmp, "root")
	for _, deb := range debs {
		if err := run(ctx, tmp, "dpkg", "-x", deb, root); err != nil {
			return err
		}
	}
	if err := os.Chmod(root, 0o755); err != nil {
		return err
	}
	// Another process may have been faster: its tree is as good.
	if err := os.Rename(root, dir); err != nil && !exists(dir) {
		return err
	}
	return nil
}

func run(ctx context.Context, dir, name string, args ...string) error {
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = dir
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("%s %s: %w: %s", name, strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return nil
}
