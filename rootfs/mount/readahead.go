package mount

import (
	"context"
	"os"
	"path/filepath"
	"strconv"

	"github.com/tatami-containers/tatami/rootfs/mount/loop"
)

// defaultReadAhead is the read-ahead of lowers in bytes. The kernel's 128 KiB
// make cold sequential reads two to three times slower; 1 MiB adds little to
// that, and doubles what a page fault in a program brings into memory.
const defaultReadAhead = 512 << 10

// bdiDir has one folder for each filesystem or device that reads ahead.
const bdiDir = "/sys/class/bdi"

// withReadAhead runs mount, which mounts a lower and returns its loop device,
// if any, and sets the read-ahead of what was mounted. That only costs or wins
// speed, so failures are no more than logged.
//
// EROFS on a file has a number of its own in bdiDir that nothing leads to from
// the mount. It is the one that was not there before; if there are several,
// somebody else mounted too, and all stay as they are.
func (m *Mounter) withReadAhead(ctx context.Context, p Path, mount func() (string, error)) (string, error) {
	var before map[string]bool
	if p == FilePath {
		unlock, err := m.locks.lock(ctx, "read-ahead")
		if err != nil {
			return "", err
		}
		defer unlock()
		before = erofsNumbers()
	}
	device, err := mount()
	if err != nil {
		return "", err
	}
	if p == LoopPath {
		err = loop.SetReadAhead(device, m.cfg.ReadAhead)
	} else {
		err = setNewReadAhead(before, m.cfg.ReadAhead)
	}
	if err != nil {
		m.log.Warn("read-ahead not set; cold sequential reads will be slower", "err", err)
	}
	return device, nil
}

func setNewReadAhead(before map[string]bool, n int64) error {
	var fresh []string
	for path := range erofsNumbers() {
		if !before[path] {
			fresh = append(fresh, path)
		}
	}
	if len(fresh) != 1 {
		return nil
	}
	return os.WriteFile(filepath.Join(fresh[0], "read_ahead_kb"), []byte(strconv.FormatInt(n/1024, 10)), 0)
}

func erofsNumbers() map[string]bool {
	paths, _ := filepath.Glob(filepath.Join(bdiDir, "erofs-*")) // the pattern is well-formed
	set := make(map[string]bool, len(paths))
	for _, p := range paths {
		set[p] = true
	}
	return set
}
