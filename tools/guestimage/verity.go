package guestimage

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// A hash tree as dm-verity reads it, hash type 1, without a superblock (Linux,
// Documentation/admin-guide/device-mapper/verity.rst): blocks of SHA-256 sums
// of the salted blocks below, the highest level first.
const (
	verityBlock = index.BlockSize // of data and of hashes, bytes
	maxSalt     = 256             // bytes (cryptsetup: lib/verity/verity.h)
)

// hashTree returns the tree over data, whose length must be a multiple of
// verityBlock, and the sum that stands for all of it.
func hashTree(data, salt []byte) (hashes []byte, root [sha256.Size]byte) {
	var levels [][]byte // the lowest first
	for len(data) > verityBlock {
		data = hashLevel(data, salt)
		levels = append(levels, data)
	}
	for n := range levels {
		hashes = append(hashes, levels[len(levels)-1-n]...)
	}
	return hashes, salted(data, salt)
}

// hashLevel returns the sums of all blocks, in whole blocks.
func hashLevel(data, salt []byte) []byte {
	blocks := len(data) / verityBlock
	out := make([]byte, 0, index.RoundUp(int64(blocks)*sha256.Size))
	for n := range blocks {
		sum := salted(data[n*verityBlock:(n+1)*verityBlock], salt)
		out = append(out, sum[:]...)
	}
	return out[:cap(out)]
}

func salted(block, salt []byte) (sum [sha256.Size]byte) {
	h := sha256.New()
	h.Write(salt)
	h.Write(block)
	h.Sum(sum[:0])
	return sum
}

// contentSalt derives a salt from what it is for, so that it is not a choice.
func contentSalt(data []byte) []byte {
	h := sha256.New()
	h.Write([]byte("tatami dm-verity salt\x00"))
	h.Write(data)
	return h.Sum(nil)
}

// verityParams writes the record that Kata's configuration and the guest's
// mount script parse (kata-containers: src/libs/kata-types/src/config/
// hypervisor/mod.rs parse_kernel_verity_params, src/agent/
// kata-extension-mount.sh).
func verityParams(root [sha256.Size]byte, salt []byte, blocks int) string {
	return fmt.Sprintf("root_hash=%s,salt=%s,data_blocks=%d,data_block_size=%d,hash_block_size=%d",
		hex.EncodeToString(root[:]), hex.EncodeToString(salt), blocks, verityBlock, verityBlock)
}
