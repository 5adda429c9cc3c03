package convert

import (
	"archive/tar"
	"bytes"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Annotations of layers: stargz-snapshotter's, estargz/types.go and
// estargz/zstdchunked; podman's, containers/storage,
// pkg/chunked/internal/minimal/compression.go.
const (
	stargzTOC       = "containerd.io/snapshot/stargz/toc.digest"
	stargzPlainSize = "io.containers.estargz.uncompressed-size"
	stargzChecksum  = "io.containers.zstd-chunked.manifest-checksum"
	stargzPosition  = "io.containers.zstd-chunked.manifest-position"
	podmanChecksum  = "io.github.containers.zstd-chunked.manifest-checksum"
	podmanPosition  = "io.github.containers.zstd-chunked.manifest-position"
	podmanTarSplit  = "io.github.containers.zstd-chunked.tarsplit-position"
)

// The ends of footers.
const (
	stargzMagic = "GnUlInUx"
	podmanMagic = "GNUlInUx"
)

// maxTOC is what podman reads at most, bytes.
const maxTOC = 150 << 20

// encode makes the TOC's JSON.
func (t *toc) encode() ([]byte, error) {
	b, err := json.Marshal(t)
	if err == nil && len(b) > maxTOC {
		err = errTOC(len(b))
	}
	return b, err
}

// finishEStargz adds the TOC as the tar's last file, and the footer.
func (o *output) finishEStargz(t *toc, res *Result) error {
	toc, err := t.encode()
	if err != nil {
		return err
	}
	var plain bytes.Buffer
	w := tar.NewWriter(&plain)
	err = w.WriteHeader(&tar.Header{Typeflag: tar.TypeReg, Name: tocName, Mode: 0o444, Size: int64(len(toc))})
	if err == nil {
		_, err = w.Write(toc)
	}
	if err := errors.Join(err, w.Close()); err != nil {
		return err
	}
	packed, err := packOne(plain.Bytes(), o.opts)
	if err != nil {
		return err
	}
	o.addPlain(plain.Bytes())
	off := o.size
	if err := o.write(append(packed, footer(off)...)); err != nil {
		return err
	}
	res.TOC = digest.FromBytes(toc)
	res.Descriptor.MediaType = ocispec.MediaTypeImageLayerGzip
	res.Descriptor.Annotations = map[string]string{
		stargzTOC:       res.TOC.String(),
		stargzPlainSize: strconv.FormatInt(o.plainSize, 10),
	}
	return nil
}

// packOne compresses one more member.
func packOne(p []byte, o Options) ([]byte, error) {
	c, err := newCodec(o)
	if err != nil {
		return nil, err
	}
	return c.pack(nil, p)
}

// footer is an empty gzip member with the offset of the TOC in its header: an
// extra field SG of 22 bytes, flags, and an empty stored block (docs/estargz.md).
func footer(toc int64) []byte {
	b := []byte("\x1f\x8b\x08\x04\x00\x00\x00\x00\x00\xff\x1a\x00SG\x16\x00")
	b = fmt.Appendf(b, "%016xSTARGZ", toc)
	return append(b, "\x01\x00\x00\xff\xff\x00\x00\x00\x00\x00\x00\x00\x00"...)
}

// finishStargz adds TOC and footer of stargz-snapshotter's zstd dialect.
func (o *output) finishStargz(t *toc, res *Result) error {
	toc, err := t.encode()
	if err != nil {
		return err
	}
	packed, err := packOne(toc, o.opts)
	if err != nil {
		return err
	}
	off, err := o.frame(packed)
	if err != nil {
		return err
	}
	if _, err := o.frame(append(numbers(off, int64(len(packed)), int64(len(toc)), 1), stargzMagic...)); err != nil {
		return err
	}
	res.TOC = digest.FromBytes(toc)
	res.Descriptor.MediaType = ocispec.MediaTypeImageLayerZstd
	res.Descriptor.Annotations = map[string]string{
		stargzTOC:       res.TOC.String(),
		stargzPlainSize: strconv.FormatInt(o.plainSize, 10),
		stargzChecksum:  sum(packed),
		stargzPosition:  position(off, len(packed), len(toc)),
	}
	return nil
}

// finishChunked adds TOC, tar-split data and footer of podman's dialect.
func (o *output) finishChunked(t *toc, res *Result, noSplit bool) error {
	split, err := o.split.close()
	if err != nil {
		return err
	}
	if !noSplit {
		t.TarSplitDigest = sum(split)
	}
	toc, err := t.encode()
	if err != nil {
		return err
	}
	packed, err := packOne(toc, o.opts)
	if err != nil {
		return err
	}
	off, err := o.frame(packed)
	if err != nil {
		return err
	}
	res.TOC = digest.FromBytes(packed)
	res.Descriptor.MediaType = ocispec.MediaTypeImageLayerZstd
	res.Descriptor.Annotations = map[string]string{
		podmanChecksum: res.TOC.String(),
		podmanPosition: position(off, len(packed), len(toc)),
	}
	foot := numbers(off, int64(len(packed)), int64(len(toc)), 1, 0, 0, 0)
	if !noSplit {
		at, err := o.frame(split)
		if err != nil {
			return err
		}
		foot = numbers(off, int64(len(packed)), int64(len(toc)), 1, at, int64(len(split)), o.split.plain.n)
		res.Descriptor.Annotations[podmanTarSplit] = fmt.Sprintf("%d:%d:%d", at, len(split), o.split.plain.n)
	}
	_, err = o.frame(append(foot, podmanMagic...))
	return err
}

// position is offset, length and plain length of a TOC, and its type, 1.
func position(off int64, packed, plain int) string {
	return fmt.Sprintf("%d:%d:%d:1", off, packed, plain)
}

// frame writes a skippable zstd frame (RFC 8878, section 3.1.2), and returns
// where in the blob its content is.
func (o *output) frame(p []byte) (int64, error) {
	head := binary.LittleEndian.AppendUint32([]byte("\x50\x2a\x4d\x18"), uint32(len(p)))
	if err := o.write(head); err != nil {
		return 0, err
	}
	off := o.size
	return off, o.write(p)
}

// numbers is a list of 64-bit numbers, lowest byte first.
func numbers(list ...int64) []byte {
	var b []byte
	for _, n := range list {
		b = binary.LittleEndian.AppendUint64(b, uint64(n))
	}
	return b
}
