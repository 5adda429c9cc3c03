package volume

import (
	"encoding/hex"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/containerd/errdefs"
)

// Bounds of dm-verity: block sizes in bytes and the number of blocks as the Go
// runtime checks them (virtual_volume.go), the salt as the kernel does
// (drivers/md/dm-verity-target.c: it must fit beside a digest in a block).
const (
	minBlock = 1 << 9
	maxBlock = 1 << 19
	maxSalt  = 256
)

// hexDigits is how long a root hash is, by algorithm.
var hexDigits = map[string]int{"sha256": 64, "sha1": 40}

// kinds say what each type must have: the rules of mount.rs, validate.
var kinds = map[Type]struct {
	fsTypes []string // one of these; anything but nothing when empty
	noFS    bool     // FSType does not count
	nydus   bool
	pull    bool
}{
	DirectBlock:     {},
	ImageRawBlock:   {},
	LayerRawBlock:   {},
	ImageNydusBlock: {fsTypes: []string{"rafsv6"}, nydus: true},
	LayerNydusBlock: {fsTypes: []string{"rafsv6"}, nydus: true},
	ImageNydusFS:    {fsTypes: []string{"rafsv5", "rafsv6"}, nydus: true},
	LayerNydusFS:    {fsTypes: []string{"rafsv5", "rafsv6"}, nydus: true},
	GuestPull:       {noFS: true, pull: true},
}

// Validate says what Kata's runtimes would refuse; ErrInvalidArgument.
func (v *Volume) Validate() error {
	if reason := v.invalid(); reason != "" {
		return fmt.Errorf("volume of type %q: %s: %w", v.Type, reason, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (v *Volume) invalid() string {
	kind, ok := kinds[v.Type]
	switch {
	case !ok:
		return "unknown type"
	case v.Source == "" && v.Type == GuestPull:
		return "no image reference in source"
	case v.Source == "":
		return "no path in source"
	case !kind.noFS && v.FSType == "":
		return "no fs_type"
	case len(kind.fsTypes) > 0 && !slices.Contains(kind.fsTypes, v.FSType):
		return fmt.Sprintf("fs_type %q, want %s", v.FSType, strings.Join(kind.fsTypes, " or "))
	case kind.nydus && (v.Nydus == nil || v.Nydus.Config == "" || v.Nydus.SnapshotDir == ""):
		return "no config or snapshot_dir in nydus_image"
	case kind.pull && v.ImagePull == nil:
		return "no image_pull, which the Go runtime needs"
	}
	return v.invalidParts()
}

// invalidParts looks at parts also where the type does not use them, as the Go
// runtime does (IsValid).
func (v *Volume) invalidParts() string {
	switch {
	case v.Direct != nil && v.Direct.Metadata == nil:
		return "no metadata in direct_volume, which the Go runtime needs"
	case v.ImagePull != nil && v.ImagePull.Metadata == nil:
		return "no metadata in image_pull, which the Go runtime needs"
	case v.Nydus != nil && v.Nydus.Config == "" && v.Nydus.SnapshotDir == "":
		return "nothing in nydus_image"
	case v.Verity != nil:
		if reason := v.Verity.invalid(); reason != "" {
			return "dm_verity: " + reason
		}
	}
	return v.invalidText()
}

// invalidText finds strings that JSON, which is UTF-8, or a path, which ends at
// a zero byte, would change.
func (v *Volume) invalidText() string {
	for _, s := range append([]string{v.Source, v.FSType}, v.Options...) {
		if !isText(s) {
			return fmt.Sprintf("%q is not a text", s)
		}
	}
	return ""
}

func isText(s string) bool { return utf8.ValidString(s) && !strings.ContainsRune(s, 0) }

func (d *Verity) invalid() string {
	digits, ok := hexDigits[strings.ToLower(d.Algorithm)]
	switch {
	case !ok:
		return fmt.Sprintf("hashtype %q, want sha256 or sha1", d.Algorithm)
	case len(d.RootHash) != digits || !isHex(d.RootHash):
		return fmt.Sprintf("hash is not one of %s in hex", d.Algorithm)
	case d.DataBlocks == 0 || d.DataBlocks > 1<<32-1:
		return fmt.Sprintf("blocknum %d is not 1 to %d", d.DataBlocks, int64(1<<32-1))
	case d.DataBlockSize < minBlock || d.DataBlockSize > maxBlock || d.HashBlockSize < minBlock || d.HashBlockSize > maxBlock:
		return fmt.Sprintf("blocksize %d or hashsize %d is not %d to %d", d.DataBlockSize, d.HashBlockSize, minBlock, maxBlock)
	case d.Offset%d.HashBlockSize != 0 || d.Offset < d.DataBlocks*d.DataBlockSize:
		return fmt.Sprintf("offset %d is inside the data or not a multiple of hashsize", d.Offset)
	case len(d.Salt) > 2*maxSalt || !isHex(d.Salt):
		return "salt is not hex, or too long"
	case d.Format != nil && *d.Format > 1:
		return fmt.Sprintf("hash_type %d, want 0 or 1", *d.Format)
	}
	return ""
}

func isHex(s string) bool {
	_, err := hex.DecodeString(s)
	return err == nil
}
