package snapshotter

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// findMkfs looks for mkfs.ext4, also where the PATH of a daemon has no sbin.
func findMkfs() (string, error) {
	if path, err := exec.LookPath("mkfs.ext4"); err == nil {
		return filepath.Abs(path)
	}
	for _, dir := range []string{"/usr/sbin", "/sbin", "/usr/local/sbin"} {
		if path, err := exec.LookPath(filepath.Join(dir, "mkfs.ext4")); err == nil {
			return path, nil
		}
	}
	return "", fmt.Errorf("block mode needs mkfs.ext4; install e2fsprogs, or set upper_size = \"0\": %w", errdefs.ErrFailedPrecondition)
}

// makeUpperFile makes the image for the container's writes: a sparse file with
// an empty ext4.
func (d *draft) makeUpperFile(ctx context.Context) error {
	if d.s.cfg.UpperSize == 0 {
		return nil
	}
	size, err := upperSize(d.request.labels, d.s.cfg.UpperSize)
	if err != nil {
		return err
	}
	path := d.path(upperFile)
	err = errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size))
	if err == nil {
		err = makeExt4(ctx, d.s.mkfs, path)
	}
	if err != nil {
		return errors.Join(err, os.Remove(path))
	}
	d.upper = true
	d.s.cfg.step("upper file")
	return nil
}

// upperSize is the configured size, or the smaller one that the container asks
// for: the label comes from the annotations of pods.
func upperSize(labels map[string]string, configured int64) (bytes int64, err error) {
	asked, ok := labels[snapshots.LabelSnapshotMaxSize]
	if !ok {
		return configured, nil
	}
	n, err := strconv.ParseInt(asked, 10, 64)
	if err != nil || n < minUpper || n > configured {
		return 0, fmt.Errorf("label %s is %.32q; it is bytes, from %d to the configured upper_size %d: %w",
			snapshots.LabelSnapshotMaxSize, asked, int64(minUpper), configured, errdefs.ErrInvalidArgument)
	}
	return n, nil
}

// makeExt4 formats a file of zeros. What mkfs would write of zeros stays a hole,
// and no blocks are reserved for root.
func makeExt4(ctx context.Context, mkfs, path string) error {
	cmd := exec.CommandContext(ctx, mkfs, "-q", "-F", "-m", "0", "-E", "lazy_itable_init=1,lazy_journal_init=1,nodiscard", path)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Run(); err != nil {
		return fmt.Errorf("%s %s: %w: %.512q", mkfs, path, err, strings.TrimSpace(said.String()))
	}
	return nil
}

// mappedRoot is who root of a container with a user namespace is on the host. The
// labels have the form "0:100000:65536", container ID, host ID, count, and may
// list several (containerd's internal/userns). containerd has by then given the
// layers below to that user (remapRootFS in its client/container_opts_unix.go),
// as it does for a snapshotter without the capability "remap-ids".
func mappedRoot(labels map[string]string) (uid, gid int, mapped bool, err error) {
	uids, hasUID := labels[snapshots.LabelSnapshotUIDMapping]
	gids, hasGID := labels[snapshots.LabelSnapshotGIDMapping]
	if !hasUID && !hasGID {
		return 0, 0, false, nil
	}
	uid, err = hostRoot(uids)
	if err == nil {
		gid, err = hostRoot(gids)
	}
	if err != nil {
		return 0, 0, false, fmt.Errorf("labels %s %.64q and %s %.64q: %w", snapshots.LabelSnapshotUIDMapping, uids, snapshots.LabelSnapshotGIDMapping, gids, err)
	}
	return uid, gid, true, nil
}

func hostRoot(mapping string) (int, error) {
	for one := range strings.SplitSeq(mapping, ",") {
		parts := strings.Split(one, ":")
		if len(parts) != 3 {
			break
		}
		var n [3]uint64
		for i, p := range parts {
			var err error
			if n[i], err = strconv.ParseUint(p, 10, 31); err != nil {
				return 0, fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
			}
		}
		if n[0] == 0 && n[2] > 0 {
			return int(n[1]), nil
		}
	}
	return 0, fmt.Errorf("no mapping of root: %w", errdefs.ErrInvalidArgument)
}
