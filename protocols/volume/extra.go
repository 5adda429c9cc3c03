package volume

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"path"

	"github.com/containerd/errdefs"
)

// NydusType is the type of a mount that has an Extra. runtime-rs takes no other
// (NYDUS_ROOTFS_TYPE in its crates/resource/src/rootfs/nydus_rootfs.rs), the Go
// runtime takes all that begin so (IsNydusRootFSType in kata_agent.go). containerd
// runs mount.fuse for it, and that nydus-overlayfs, which it looks for in PATH.
const NydusType = "fuse.nydus-overlayfs"

// ExtraPrefix begins the mount option with an Extra (extraOptionKey in Kata's
// nydusd.go; NydusExtraOptions::new in mount.rs).
const ExtraPrefix = "extraoption="

// FSVersion is the one that Extra.Option writes: runtime-rs wants "v5" or "v6" and
// makes no difference between them (NydusRootfs::new in nydus_rootfs.rs).
const FSVersion = "v6"

// Extra tells Kata's runtimes of a container whose image its virtio-fs daemon
// serves (shared_fs "virtio-fs-nydus"):
//
//	extraoption=<base64 of JSON>
//
// The daemon is given Source and Config as they are, the guest SnapshotDir, in
// which it writes: its overlay has the upper SnapshotDir/fs and the work directory
// SnapshotDir/work.
type Extra struct {
	Source      string `json:"source"`
	Config      string `json:"config"`      // not empty
	SnapshotDir string `json:"snapshotdir"` // on the host
	FSVersion   string `json:"fs_version"`  // read by runtime-rs alone
}

// Option encodes e as a mount option. ErrInvalidArgument when one of Kata's
// runtimes would refuse it.
func (e Extra) Option() (string, error) {
	if reason := e.invalid(); reason != "" {
		return "", fmt.Errorf("extra option %+v: %s: %w", e, reason, errdefs.ErrInvalidArgument)
	}
	text, err := json.Marshal(e)
	if err != nil {
		return "", err
	}
	return ExtraPrefix + base64.StdEncoding.EncodeToString(text), nil
}

func (e Extra) invalid() string {
	switch {
	case e.Source == "" || e.Config == "" || e.SnapshotDir == "":
		return "source, config or snapshotdir is empty"
	case !path.IsAbs(e.SnapshotDir):
		return "snapshotdir is not an absolute path"
	case e.FSVersion != "v5" && e.FSVersion != "v6":
		return "fs_version is neither v5 nor v6"
	case !isText(e.Source) || !isText(e.Config) || !isText(e.SnapshotDir):
		return "not a text"
	}
	return ""
}
