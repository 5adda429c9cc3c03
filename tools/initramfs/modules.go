package initramfs

import (
	"bytes"
	"compress/gzip"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/klauspost/compress/zstd"
	"github.com/ulikunitz/xz"
)

// maxModule bounds a decompressed module in bytes; the largest of Debian has 20 MB.
const maxModule = 256 << 20

// module is a kernel module, decompressed.
type module struct {
	name string
	data []byte
}

// resolver finds modules and what they depend on. It reads the dependencies from
// the modules' own .modinfo and so needs no depmod run.
type resolver struct {
	dir     string            // /lib/modules/<release>
	files   map[string]string // path by module name
	builtin map[string]bool
	done    map[string]bool
	order   []module
}

// resolveModules returns the wanted modules and their dependencies in the order of
// loading; those of optional that the kernel does not have are left out.
func resolveModules(dir string, want, optional []string) ([]module, error) {
	r := &resolver{dir: dir, files: map[string]string{}, builtin: map[string]bool{}, done: map[string]bool{}}
	if err := r.scan(); err != nil {
		return nil, fmt.Errorf("read kernel modules: %w", err)
	}
	for _, name := range want {
		if err := r.visit(name, true); err != nil {
			return nil, err
		}
	}
	for _, name := range optional {
		if err := r.visit(name, false); err != nil {
			return nil, err
		}
	}
	return r.order, nil
}

func (r *resolver) scan() error {
	err := filepath.WalkDir(r.dir, func(p string, d fs.DirEntry, err error) error {
		if name, ok := moduleName(p); ok && err == nil && d.Type().IsRegular() {
			r.files[name] = p
		}
		return err
	})
	if err != nil {
		return err
	}
	b, err := os.ReadFile(filepath.Join(r.dir, "modules.builtin"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	for line := range strings.Lines(string(b)) {
		if name, ok := moduleName(strings.TrimSpace(line)); ok {
			r.builtin[name] = true
		}
	}
	return nil
}

// moduleName is a module's name by its file; the kernel takes "-" for "_".
func moduleName(path string) (string, bool) {
	name, ext, _ := strings.Cut(filepath.Base(path), ".")
	switch ext {
	case "ko", "ko.xz", "ko.zst", "ko.gz":
		return canonical(name), true
	}
	return "", false
}

func canonical(name string) string { return strings.ReplaceAll(name, "-", "_") }

func (r *resolver) visit(name string, required bool) error {
	name = canonical(name)
	if r.done[name] || r.builtin[name] {
		return nil
	}
	path, ok := r.files[name]
	if !ok && !required {
		return nil
	}
	if !ok {
		return fmt.Errorf("kernel module %s: %w in %s; choose a kernel that has it", name, errdefs.ErrNotFound, r.dir)
	}
	r.done[name] = true // before its dependencies: a cycle ends
	data, err := readModule(path)
	if err != nil {
		return fmt.Errorf("kernel module %s: %w", path, err)
	}
	info, err := parseModinfo(data)
	if err != nil {
		return fmt.Errorf("kernel module %s: %w", path, err)
	}
	for _, dep := range info.soft {
		if err := r.visit(dep, false); err != nil {
			return err
		}
	}
	for _, dep := range info.depends {
		if err := r.visit(dep, true); err != nil {
			return err
		}
	}
	r.order = append(r.order, module{name, data})
	return nil
}

func readModule(path string) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r, err := decompress(f, filepath.Ext(path))
	if err != nil {
		return nil, err
	}
	defer r.Close()
	data, err := io.ReadAll(io.LimitReader(r, maxModule+1))
	if err == nil && len(data) > maxModule {
		err = fmt.Errorf("more than %d bytes", maxModule)
	}
	return data, err
}

func decompress(r io.Reader, ext string) (io.ReadCloser, error) {
	switch ext {
	case ".xz":
		x, err := xz.NewReader(r)
		return io.NopCloser(x), err
	case ".zst":
		z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1))
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	case ".gz":
		return gzip.NewReader(r)
	}
	return io.NopCloser(r), nil
}

// modinfo is what a module says of its needs.
type modinfo struct {
	depends []string
	soft    []string // to be loaded first where they exist
}

func parseModinfo(data []byte) (modinfo, error) {
	f, err := elf.NewFile(bytes.NewReader(data))
	if err != nil {
		return modinfo{}, err
	}
	s := f.Section(".modinfo")
	if s == nil {
		return modinfo{}, fmt.Errorf("no .modinfo section")
	}
	b, err := s.Data()
	if err != nil {
		return modinfo{}, err
	}
	var info modinfo
	for field := range strings.SplitSeq(string(b), "\x00") {
		key, value, _ := strings.Cut(field, "=")
		switch key {
		case "depends":
			info.depends = append(info.depends, splitList(value)...)
		case "softdep":
			info.soft = append(info.soft, softPre(value)...)
		}
	}
	return info, nil
}

func splitList(s string) []string {
	return slices.DeleteFunc(strings.Split(s, ","), func(s string) bool { return s == "" })
}

// softPre reads "pre: a b post: c".
func softPre(s string) []string {
	s, _, _ = strings.Cut(s, "post:")
	_, s, ok := strings.Cut(s, "pre:")
	if !ok {
		return nil
	}
	return strings.Fields(s)
}
