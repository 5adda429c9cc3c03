package initramfs

import (
	"bytes"
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
)

// linker finds what dynamic executables need at run time: the interpreter and, by
// DT_NEEDED, the libraries. Each is kept under the name by which it is asked for,
// whatever symbolic links lead to its file.
type linker struct {
	dirs  []string          // where the dynamic linker looks
	files map[string]string // guest path → file of this machine
}

// defaultDirs is where dynamic linkers look without any configuration: those of
// the distributions, with and without multiarch. They are also the only ones that
// work in the guest, which has no ld.so.cache.
func defaultDirs(m elf.Machine) []string {
	dirs := []string{"/lib64", "/usr/lib64", "/lib", "/usr/lib"}
	triplets := map[elf.Machine]string{elf.EM_X86_64: "x86_64-linux-gnu", elf.EM_AARCH64: "aarch64-linux-gnu"}
	if t, ok := triplets[m]; ok {
		dirs = append([]string{"/lib/" + t, "/usr/lib/" + t}, dirs...)
	}
	return dirs
}

// add adds an executable with all that it needs.
func (l *linker) add(path string) error {
	if err := l.visit(path, path); err != nil {
		return fmt.Errorf("add %s: %w", path, err)
	}
	return nil
}

// visit adds file under the guest path name, then its interpreter and libraries.
func (l *linker) visit(name, file string) error {
	if _, ok := l.files[name]; ok {
		return nil
	}
	f, err := elf.Open(file)
	if err != nil {
		return err
	}
	defer f.Close()
	l.files[name] = file
	if interp, err := interpreter(f); err != nil {
		return fmt.Errorf("interpreter of %s: %w", file, err)
	} else if interp != "" {
		if err := l.visit(interp, interp); err != nil {
			return err
		}
	}
	needed, err := f.ImportedLibraries()
	if err != nil {
		return fmt.Errorf("libraries of %s: %w", file, err)
	}
	for _, lib := range needed {
		if err := l.library(f, file, lib); err != nil {
			return err
		}
	}
	return nil
}

func interpreter(f *elf.File) (string, error) {
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			b, err := io.ReadAll(io.LimitReader(p.Open(), 4096))
			return string(bytes.TrimRight(b, "\x00")), err
		}
	}
	return "", nil
}

// library finds the library that user needs.
func (l *linker) library(f *elf.File, user, lib string) error {
	if strings.HasPrefix(lib, "/") {
		return l.visit(lib, lib)
	}
	own, err := runPaths(f, user)
	if err != nil {
		return err
	}
	standard := defaultDirs(f.Machine)
	for _, dir := range slices.Concat(own, standard, l.dirs) {
		path := filepath.Join(dir, lib)
		if !l.fits(f, path) {
			continue
		}
		name := path
		if !slices.Contains(standard, dir) && !slices.Contains(own, dir) {
			// Only this machine's linker knows the directory.
			name = filepath.Join(standard[0], lib)
		}
		return l.visit(name, path)
	}
	return fmt.Errorf("library %s of %s: %w; install the package that has it", lib, user, errdefs.ErrNotFound)
}

// fits tells whether path is a library for the machine of f, as the dynamic linker
// checks, too.
func (l *linker) fits(f *elf.File, path string) bool {
	g, err := elf.Open(path)
	if err != nil {
		return false
	}
	defer g.Close()
	return g.Machine == f.Machine && g.Class == f.Class
}

// runPaths are the directories that the file itself names.
func runPaths(f *elf.File, file string) ([]string, error) {
	var dirs []string
	for _, tag := range []elf.DynTag{elf.DT_RPATH, elf.DT_RUNPATH} {
		lists, err := f.DynString(tag)
		if err != nil {
			return nil, fmt.Errorf("run path of %s: %w", file, err)
		}
		for _, list := range lists {
			for dir := range strings.SplitSeq(list, ":") {
				origin := filepath.Dir(file)
				dir = strings.NewReplacer("$ORIGIN", origin, "${ORIGIN}", origin).Replace(dir)
				if filepath.IsAbs(dir) {
					dirs = append(dirs, filepath.Clean(dir))
				}
			}
		}
	}
	return dirs, nil
}

// configuredDirs reads ld.so.conf and the files that it includes.
func configuredDirs(conf string) ([]string, error) {
	b, err := os.ReadFile(conf)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var dirs []string
	for line := range strings.Lines(string(b)) {
		line, _, _ = strings.Cut(line, "#")
		f := strings.Fields(line)
		switch {
		case len(f) == 2 && f[0] == "include":
			more, err := includedDirs(conf, f[1])
			if err != nil {
				return nil, err
			}
			dirs = append(dirs, more...)
		case len(f) == 1 && filepath.IsAbs(f[0]):
			dirs = append(dirs, filepath.Clean(f[0]))
		}
	}
	return dirs, nil
}

// includedDirs follows "include pattern". Includes in included files are not
// followed: no distribution has them, and they could make a loop.
func includedDirs(conf, pattern string) ([]string, error) {
	if !filepath.IsAbs(pattern) {
		pattern = filepath.Join(filepath.Dir(conf), pattern)
	}
	names, err := filepath.Glob(pattern)
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, name := range names {
		b, err := os.ReadFile(name)
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(string(b)) {
			line, _, _ = strings.Cut(line, "#")
			if line = strings.TrimSpace(line); filepath.IsAbs(line) {
				dirs = append(dirs, filepath.Clean(line))
			}
		}
	}
	return dirs, nil
}
