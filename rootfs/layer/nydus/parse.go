package nydus

import (
	"github.com/tatami-containers/tatami/rootfs/index"
)

// Flags of a file system, the same in v5 and v6 (nydus, rafs/src/metadata/mod.rs,
// RafsSuperFlags). The compatible ones are reserved.
const (
	flagLZ4        = 0x2
	flagBLAKE3     = 0x4
	flagSHA256     = 0x8
	flagOwners     = 0x10 // without it files belong to whoever serves them
	flagGzip       = 0x40
	flagZstd       = 0x80
	flagTarfs      = 0x200
	flagEncrypted  = 0x200_0000
	flagsKnown     = 0x3ff | 0x300_0000
	flagCompatible = 0xfc00_0000
)

// parse reads the superblock and the tables of a bootstrap, v5 or v6.
func parse(boot []byte) (format, error) {
	c := content(boot)
	if b, err := c.at(0, 8); err == nil && le.Uint32(b) == v5Magic {
		return parseV5(c)
	}
	return parseV6(c)
}

// flags are a file system's.
type flags uint64

func (f flags) check() error {
	switch {
	case f&^(flagsKnown|flagCompatible) != 0:
		return invalid("bootstrap has unknown flags %#x; it needs a newer version of this program", uint64(f&^(flagsKnown|flagCompatible)))
	case f&flagEncrypted != 0:
		return errEncrypted("of the bootstrap")
	case f&flagTarfs != 0:
		return errTarfs()
	case f&flagBLAKE3 != 0 && f&flagSHA256 != 0:
		return invalid("bootstrap has two digest algorithms")
	}
	return nil
}

// algorithm of the chunks' digests.
func (f flags) algorithm() index.Algorithm {
	if f&flagSHA256 != 0 {
		return index.SHA256
	}
	return index.BLAKE3
}

// compressor is that of v5, whose blobs do not say it themselves.
func (f flags) compressor() uint32 {
	switch {
	case f&flagLZ4 != 0:
		return compressLZ4
	case f&flagGzip != 0:
		return compressGzip
	case f&flagZstd != 0:
		return compressZstd
	}
	return compressNone
}

// owner is who a file belongs to. A bootstrap without owners leaves it to the
// server, which for a container's root is root.
func (f flags) owner(uid, gid uint32) (uint32, uint32) {
	if f&flagOwners == 0 {
		return 0, 0
	}
	return uid, gid
}

// kindOf is the kind for the type bits of a mode. Sockets are 0: no image layer
// can have one, only a directory that was converted, and to no use.
func kindOf(mode uint32) (index.Kind, error) {
	switch mode & 0o170000 {
	case 0o100000:
		return index.File, nil
	case 0o040000:
		return index.Dir, nil
	case 0o120000:
		return index.Symlink, nil
	case 0o020000:
		return index.Char, nil
	case 0o060000:
		return index.Block, nil
	case 0o010000:
		return index.Fifo, nil
	case 0o140000:
		return 0, nil
	}
	return 0, invalid("unknown type in mode %#o", mode)
}

// setDevice splits a device number as the kernel's new_decode_dev does.
func setDevice(e *index.Entry, rdev uint32) {
	if e.Kind == index.Char || e.Kind == index.Block {
		e.Major, e.Minor = rdev>>8&0xfff, rdev&0xff|rdev>>12&0xfff00
	}
}
