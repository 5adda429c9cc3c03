// Package pathlist reads and writes plain lists of paths, one a line, as
// stargz-snapshotter and nydus use them to say what a start of an image reads.
package pathlist

import (
	"bufio"
	"bytes"
	"errors"
	"fmt"
	"io"
	"strings"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/layer/tarball"
)

// maxPaths bounds the paths of a list, and MaxSize the bytes of one that is written: it
// fits into a message of ttrpc, of 4 MiB.
const (
	maxPaths = 1 << 20
	MaxSize  = 3 << 20
)

// Read reads a list. Empty lines and those that begin with # do not count. The paths
// are clean and relative, as index.Entry has them.
func Read(r io.Reader) ([]string, error) {
	var paths []string
	lines := bufio.NewScanner(r)
	n := 1
	for ; lines.Scan(); n++ {
		text := strings.TrimSpace(lines.Text())
		if text == "" || text[0] == '#' {
			continue
		}
		path, err := tarball.Clean(text)
		if err != nil || len(paths) == maxPaths {
			return nil, fmt.Errorf("line %d: not one of up to %d paths: %w", n, maxPaths, errdefs.ErrInvalidArgument)
		}
		paths = append(paths, path)
	}
	err := lines.Err()
	if errors.Is(err, bufio.ErrTooLong) {
		err = fmt.Errorf("line %d: %w: %w", n, err, errdefs.ErrInvalidArgument)
	}
	if err != nil {
		return nil, err
	}
	return paths, nil
}

// Write returns a list of absolute paths. Those that a list cannot have, with line
// feeds or spaces around them, and those for which MaxSize has no room are left out.
func Write(paths []string) []byte {
	var out bytes.Buffer
	for _, p := range paths {
		line := "/" + p
		if strings.ContainsAny(line, "\n\r") || strings.TrimSpace(line) != line {
			continue
		}
		if out.Len()+len(line)+1 > MaxSize {
			break
		}
		out.WriteString(line)
		out.WriteByte('\n')
	}
	return out.Bytes()
}
