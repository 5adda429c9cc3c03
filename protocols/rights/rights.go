// Package rights takes the descriptors out of what came over a unix socket
// (SCM_RIGHTS, unix(7)).
package rights

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Parse returns the descriptors of control messages, which the caller has to close,
// also those that come with an error.
func Parse(oob []byte) (fds []int, err error) {
	if len(oob) == 0 {
		return nil, nil
	}
	messages, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control message: %w", err)
	}
	for i := range messages {
		more, err := unix.ParseUnixRights(&messages[i])
		if err != nil {
			return fds, fmt.Errorf("control message: %w", err)
		}
		fds = append(fds, more...)
	}
	return fds, nil
}

// Files is Parse with files of the given name.
func Files(oob []byte, name string) (files []*os.File, err error) {
	fds, err := Parse(oob)
	for _, fd := range fds {
		files = append(files, os.NewFile(uintptr(fd), name))
	}
	return files, err
}
