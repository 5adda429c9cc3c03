package guestimage

import (
	"bytes"
	"debug/elf"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"slices"

	"github.com/containerd/errdefs"
)

// maxProgram bounds a program in bytes: it is kept in memory.
const maxProgram = 512 << 20

// machines are the architectures of guests, by the names of GOARCH.
var machines = map[string]elf.Machine{"amd64": elf.EM_X86_64, "arm64": elf.EM_AARCH64}

// staticProgram reads a program that must run by itself in a guest.
func staticProgram(path, arch string) ([]byte, error) {
	b, needs, err := program(path, arch)
	if err != nil {
		return nil, err
	}
	if len(needs) > 0 {
		return nil, fmt.Errorf("%s needs %q, which the guest may not have: build it static (CGO_ENABLED=0 go build): %w",
			path, needs, errdefs.ErrInvalidArgument)
	}
	return b, nil
}

// program reads a program for the given architecture, and returns which
// dynamic linker and libraries it needs: none when it is static.
func program(path, arch string) (b []byte, needs []string, err error) {
	if b, err = readFile(path); err != nil {
		return nil, nil, err
	}
	f, err := elf.NewFile(bytes.NewReader(b))
	if err != nil {
		return nil, nil, fmt.Errorf("%s is no ELF program: %w: %w", path, err, errdefs.ErrInvalidArgument)
	}
	if f.Class != elf.ELFCLASS64 || f.Machine != machines[arch] {
		return nil, nil, fmt.Errorf("%s is for %s of %s, not for %s: %w", path, f.Machine, f.Class, arch, errdefs.ErrInvalidArgument)
	}
	if f.Type != elf.ET_EXEC && f.Type != elf.ET_DYN {
		return nil, nil, fmt.Errorf("%s is an ELF file of type %s and no program: %w", path, f.Type, errdefs.ErrInvalidArgument)
	}
	for _, p := range f.Progs {
		if p.Type == elf.PT_INTERP {
			name, err := io.ReadAll(io.LimitReader(p.Open(), 4096))
			if err != nil {
				return nil, nil, fmt.Errorf("interpreter of %s: %w", path, err)
			}
			needs = append(needs, string(bytes.TrimRight(name, "\x00")))
		}
	}
	libraries, err := f.ImportedLibraries()
	if err != nil {
		return nil, nil, fmt.Errorf("libraries of %s: %w", path, err)
	}
	slices.Sort(libraries)
	return b, append(needs, libraries...), nil
}

// readFile reads a regular file that is not larger than a program may be.
func readFile(path string) ([]byte, error) {
	f, err := os.Open(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	if !st.Mode().IsRegular() || st.Size() > maxProgram {
		return nil, fmt.Errorf("%s is no regular file of at most %d MiB: %w", path, maxProgram>>20, errdefs.ErrInvalidArgument)
	}
	return io.ReadAll(io.LimitReader(f, maxProgram))
}
