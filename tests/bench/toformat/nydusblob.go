package main

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"os"

	"github.com/klauspost/compress/zstd"
	"github.com/opencontainers/go-digest"
)

// nydusParts are the named parts of a blob with inline metadata. Such a blob is
// a tar backwards: each part is followed by its header. A last part, if there
// is one, is a table of contents that says how the others are compressed
// (nydus-snapshotter, pkg/converter/convert_unix.go).
type nydusParts struct {
	file      *os.File
	parts     map[string]nydusPart
	tocDigest digest.Digest
}

type nydusPart struct {
	off, size int64 // compressed
	zstd      bool
}

const (
	tarBlock      = 512
	nydusTOC      = "rafs.blob.toc"
	nydusTOCEntry = 128 // bytes
)

func openNydusBlob(path string) (*nydusParts, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	st, err := f.Stat()
	if err != nil {
		return nil, err
	}
	p := &nydusParts{file: f, parts: map[string]nydusPart{}}
	for end := st.Size(); end >= tarBlock; {
		h, err := tar.NewReader(io.NewSectionReader(f, end-tarBlock, tarBlock)).Next()
		if err != nil {
			return nil, fmt.Errorf("header before offset %d: %w", end, err)
		}
		off := end - tarBlock - h.Size
		if off < 0 {
			return nil, fmt.Errorf("part %q of %d bytes ends at %d", h.Name, h.Size, end-tarBlock)
		}
		if h.Name == nydusTOC {
			return p, p.readTOC(off, h.Size)
		}
		p.parts[h.Name] = nydusPart{off: off, size: h.Size}
		end = off
		if h.Name == "image.blob" {
			break // the data comes first
		}
	}
	return p, nil
}

// readTOC reads entries of: flags u32 (1 plain, 2 zstd), reserved u32, name
// [16], sha256 [32], compressed offset, compressed size, plain size u64, reserved.
func (p *nydusParts) readTOC(off, size int64) error {
	b := make([]byte, size)
	if _, err := p.file.ReadAt(b, off); err != nil {
		return err
	}
	p.tocDigest = digest.FromBytes(b)
	for ; len(b) >= nydusTOCEntry; b = b[nydusTOCEntry:] {
		name := string(bytes.TrimRight(b[8:24], "\x00"))
		p.parts[name] = nydusPart{
			off: int64(binary.LittleEndian.Uint64(b[56:])), size: int64(binary.LittleEndian.Uint64(b[64:])),
			zstd: b[0]&2 != 0,
		}
	}
	return nil
}

func (p *nydusParts) read(name string) ([]byte, error) {
	part, ok := p.parts[name]
	if !ok {
		return nil, fmt.Errorf("the blob has no part %q", name)
	}
	b := make([]byte, part.size)
	if _, err := p.file.ReadAt(b, part.off); err != nil || !part.zstd {
		return b, err
	}
	d, err := zstd.NewReader(nil)
	if err != nil {
		return nil, err
	}
	defer d.Close()
	return d.DecodeAll(b, nil)
}
