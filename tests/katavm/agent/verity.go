package main

import (
	"bytes"
	"encoding/binary"
	"fmt"
	"os"
	"strings"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Device mapper requests (include/uapi/linux/dm-ioctl.h): _IOWR(0xfd, n, struct
// dm_ioctl), whose size is 312 bytes.
const (
	dmCreate  = 0xc138fd03
	dmSuspend = 0xc138fd06 // without the suspend flag it resumes
	dmLoad    = 0xc138fd09

	dmHeader   = 312
	dmSpec     = 40 // struct dm_target_spec
	dmReadOnly = 1
	dmName     = 48 // offset of the name in struct dm_ioctl
	dmDevice   = 40 // offset of the device number
)

// openVerity makes a verified device of two partitions, as veritysetup open
// --no-superblock does, and returns its path. params are those of
// kata.extension.<name>.verity_params.
func openVerity(name, data, hash, params string) (string, error) {
	table, sectors, err := verityTable(data, hash, params)
	if err != nil {
		return "", err
	}
	control, err := os.OpenFile("/dev/mapper/control", os.O_RDWR, 0)
	if err != nil {
		return "", fmt.Errorf("device mapper (are dm-mod and dm-verity loaded?): %w", err)
	}
	defer control.Close()
	created, err := deviceMapper(control, dmCreate, name, 0, nil)
	if err != nil {
		return "", fmt.Errorf("create %s: %w", name, err)
	}
	if _, err := deviceMapper(control, dmLoad, name, dmReadOnly, verityTarget(table, sectors)); err != nil {
		return "", fmt.Errorf("load the table %q of %s: %w", table, name, err)
	}
	if _, err := deviceMapper(control, dmSuspend, name, 0, nil); err != nil {
		return "", fmt.Errorf("activate %s: %w", name, err)
	}
	// devtmpfs makes the node; the number is that of huge_encode_dev for small minors.
	minor := binary.NativeEndian.Uint64(created[dmDevice:]) & 0xff
	return fmt.Sprintf("/dev/dm-%d", minor), nil
}

// verityTable is the target's line (Documentation/admin-guide/device-mapper/
// verity.rst) and the size of the device in sectors.
func verityTable(data, hash, params string) (string, uint64, error) {
	p := map[string]string{"data_block_size": "4096", "hash_block_size": "4096", "salt": "-"}
	for _, pair := range strings.Split(params, ",") {
		key, value, _ := strings.Cut(pair, "=")
		p[key] = value
	}
	if p["root_hash"] == "" {
		return "", 0, fmt.Errorf("verity_params %q have no root_hash", params)
	}
	var blocks, size uint64
	if _, err := fmt.Sscan(p["data_blocks"]+" "+p["data_block_size"], &blocks, &size); err != nil {
		return "", 0, fmt.Errorf("verity_params %q: %w", params, err)
	}
	return strings.Join([]string{"1", data, hash, p["data_block_size"], p["hash_block_size"], p["data_blocks"], "0",
		"sha256", p["root_hash"], p["salt"]}, " "), blocks * size / 512, nil
}

// verityTarget encodes one target: struct dm_target_spec and its line.
func verityTarget(table string, sectors uint64) []byte {
	var b bytes.Buffer
	le := binary.NativeEndian
	b.Write(le.AppendUint64(nil, 0))                                // first sector
	b.Write(le.AppendUint64(nil, sectors))                          // length
	b.Write(le.AppendUint32(nil, 0))                                // status
	b.Write(le.AppendUint32(nil, uint32(dmSpec+(len(table)+8)&^7))) // to the next target
	b.WriteString("verity\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00") // 16 bytes
	b.WriteString(table + strings.Repeat("\x00", 8-len(table)%8))
	return b.Bytes()
}

// deviceMapper makes one request and returns what the kernel has written to it.
func deviceMapper(control *os.File, request uintptr, name string, flags uint32, targets []byte) ([]byte, error) {
	b := make([]byte, dmHeader, dmHeader+len(targets))
	le := binary.NativeEndian
	le.PutUint32(b[0:], 4) // version 4.0.0
	if targets != nil {
		le.PutUint32(b[16:], dmHeader)
		le.PutUint32(b[20:], 1) // one target
	}
	le.PutUint32(b[28:], flags)
	copy(b[dmName:dmName+127], name)
	b = append(b, targets...)
	le.PutUint32(b[12:], uint32(len(b)))
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, control.Fd(), request, uintptr(unsafe.Pointer(&b[0]))); errno != 0 {
		return nil, errno
	}
	return b, nil
}
