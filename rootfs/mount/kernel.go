package mount

import (
	"bytes"
	"errors"
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// param is one fsconfig(2) setting; without a value it is a flag.
type param struct {
	key   string
	value *string
}

func flag(key string) param           { return param{key: key} }
func setting(key, value string) param { return param{key, &value} }

// maxValue is the longest value that fsconfig(2) takes, in bytes.
const maxValue = 255

// paramError says which setting the kernel refused.
type paramError struct {
	key string
	err error
}

func (e *paramError) Error() string { return fmt.Sprintf("option %s: %v", e.key, e.err) }
func (e *paramError) Unwrap() error { return e.err }

// newMount makes a mount that is nowhere yet and returns its descriptor. One
// option goes to the kernel at a time, so none needs escaping against another.
func newMount(fstype string, attrs int, params ...param) (int, error) {
	fd, err := unix.Fsopen(fstype, unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("open filesystem type %s: %w", fstype, err)
	}
	defer func() { _ = unix.Close(fd) }()
	for _, p := range params {
		if err := p.apply(fd); err != nil {
			return -1, explain(fd, &paramError{p.key, err})
		}
	}
	if err := unix.FsconfigCreate(fd); err != nil {
		return -1, explain(fd, err)
	}
	m, err := unix.Fsmount(fd, unix.FSMOUNT_CLOEXEC, attrs)
	if err != nil {
		return -1, explain(fd, err)
	}
	return m, nil
}

func (p param) apply(fd int) error {
	if p.value == nil {
		return unix.FsconfigSetFlag(fd, p.key)
	}
	if len(*p.value) > maxValue {
		return unix.ENAMETOOLONG
	}
	return unix.FsconfigSetString(fd, p.key, *p.value)
}

// explain adds what the kernel has to say about a failure.
func explain(fd int, err error) error {
	var said []string
	buf := make([]byte, 1024)
	for {
		n, rerr := unix.Read(fd, buf)
		if rerr != nil || n <= 0 {
			break
		}
		said = append(said, string(bytes.TrimSpace(buf[:n])))
	}
	if len(said) == 0 {
		return err
	}
	return fmt.Errorf("%w (kernel: %s)", err, strings.Join(said, "; "))
}

// place puts a mount at path and closes its descriptor.
func place(m int, path string) error {
	defer func() { _ = unix.Close(m) }()
	if err := unix.MoveMount(m, "", unix.AT_FDCWD, path, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
		return fmt.Errorf("move mount to %s: %w", path, err)
	}
	return nil
}

// detach unmounts what is at path, if anything is, even if it is in use: it
// disappears at once and is freed with its last user.
func detach(path string) error {
	err := unix.Unmount(path, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
	if err == nil || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
		return nil
	}
	return fmt.Errorf("unmount %s: %w", path, err)
}
