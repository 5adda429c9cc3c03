package main

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// memory is what this process and all below it have, in bytes, shared pages counted
// once, and the page cache of the files in dir. QEMU's guest memory is in it. This
// process counts because it may be the machines' vsock device (package tools/vm).
func memory(dir string) (int64, error) {
	debug.FreeOSMemory()
	sum, err := pageCache(dir)
	if err != nil {
		return 0, err
	}
	pids := []string{strconv.Itoa(os.Getpid())}
	for len(pids) > 0 {
		pid := pids[0]
		pids = pids[1:]
		n, err := proportional(pid)
		if err != nil {
			return 0, err
		}
		sum += n
		files, err := filepath.Glob("/proc/" + pid + "/task/*/children")
		if err != nil {
			return 0, err
		}
		for _, f := range files {
			b, _ := os.ReadFile(f) // a thread that has ended has none
			pids = append(pids, strings.Fields(string(b))...)
		}
	}
	return sum, nil
}

// proportional is a process's PSS (Documentation/filesystems/proc.rst); 0 when it has
// ended.
func proportional(pid string) (int64, error) {
	b, err := os.ReadFile("/proc/" + pid + "/smaps_rollup")
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	_, rest, ok := strings.Cut(string(b), "\nPss:")
	if !ok {
		return 0, fmt.Errorf("no Pss in /proc/%s/smaps_rollup", pid)
	}
	kb, err := strconv.ParseInt(strings.Fields(rest)[0], 10, 64)
	return kb << 10, err
}

// pageCache is how much of the files of a directory is in the page cache.
func pageCache(dir string) (sum int64, err error) {
	err = filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return ignoreGone(err)
		}
		n, err := resident(path)
		sum += n
		return ignoreGone(err)
	})
	return sum, err
}

// ignoreGone is for files that are removed meanwhile.
func ignoreGone(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}

// resident is mincore(2) of a file.
func resident(path string) (n int64, err error) {
	f, err := os.Open(path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil || st.Size() == 0 {
		return 0, err
	}
	b, err := unix.Mmap(int(f.Fd()), 0, int(st.Size()), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, unix.Munmap(b)) }()
	page := os.Getpagesize()
	pages := make([]byte, (len(b)+page-1)/page)
	if _, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&b[0])), uintptr(len(b)), uintptr(unsafe.Pointer(&pages[0]))); errno != 0 {
		return 0, fmt.Errorf("mincore %s: %w", path, errno)
	}
	for _, p := range pages {
		n += int64(page) * int64(p&1)
	}
	return n, nil
}
