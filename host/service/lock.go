package service

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// lockRoot makes the node's directory and takes it for this process.
func lockRoot(root, socket string) (*os.File, error) {
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, fmt.Errorf("make the node's directory: %w", err)
	}
	return Lock(filepath.Join(root, "lock"), socket)
}

// Lock takes the directory that the lock file is in for this process, as long
// as the file is open. When another tatami-host has it, the error
// (ErrFailedPrecondition) says which: its pid and its control socket.
func Lock(file, socket string) (*os.File, error) {
	f, err := os.OpenFile(file, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock %s: %w", filepath.Dir(file), err)
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("another tatami-host (%s) works on it; use that one, stop it, or choose other directories (settings root and state): %w",
			owner(f), errdefs.ErrFailedPrecondition)
	}
	if err == nil {
		err = sign(f, socket)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lock %s: %w", filepath.Dir(file), err), f.Close())
	}
	return f, nil
}

// sign writes into the lock who has it: over what is there, which needs no space
// on a disk that is full.
func sign(f *os.File, socket string) error {
	text := fmt.Appendf(nil, "pid %d, socket %s\n", os.Getpid(), socket)
	if _, err := f.WriteAt(text, 0); err != nil {
		return err
	}
	return f.Truncate(int64(len(text)))
}

func owner(f *os.File) string {
	data, err := io.ReadAll(io.LimitReader(f, 1024))
	if text := strings.TrimSpace(string(data)); err == nil && text != "" {
		return text
	}
	return "which is just starting"
}
