package soci

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
)

// ztocVersion is the one version that there is.
const ztocVersion = "0.9"

// Fields of the tables Ztoc, TOC and CompressionInfo.
const (
	ztocVersionField  = 0
	ztocCompressed    = 2
	ztocUncompressed  = 3
	ztocTOC           = 4
	ztocInfo          = 5
	tocMetadata       = 0
	infoAlgorithm     = 0
	infoMaxSpan       = 1
	infoSpanDigests   = 2
	infoCheckpoints   = 3
	algorithmGzip     = 1
	algorithmUnpacked = 2
)

// maxDeflate is how many times longer its content can be than DEFLATE data:
// 258 bytes for two bits.
const maxDeflate = 1032

// Limits that no layer comes near, so that a short ztoc cannot claim a layer
// whose chunks fill the memory, or whose reads take forever.
const (
	maxData  = 256 << 30 // bytes of files in a layer
	maxPlain = 256 << 20 // bytes to inflate for nothing before a byte of a file
	maxSpan  = 64 << 20  // bytes of a blob that are held in memory until they are checked
)

// Open makes a layer of its ztoc. The blob, which desc describes, is not read
// and cannot be checked as a whole before all of it was; its spans are, by the
// digests in the ztoc. The layer's checkpoints are parts of ztoc, which must not
// change any more.
//
// Errors: ErrDataLoss if ztoc is not what its digest says, ErrInvalidArgument
// if it is not valid, of another blob, or of a layer that no ztoc describes well
// (sparse files). Such a layer can still be read without it, with layer.Build.
func Open(ztoc []byte, ztocDigest digest.Digest, desc layer.Descriptor) (*index.Layer, error) {
	l, err := open(ztoc, ztocDigest, desc)
	if err != nil {
		return nil, fmt.Errorf("ztoc %s of layer %s: %w", ztocDigest, desc.Digest, err)
	}
	return l, nil
}

func open(ztoc []byte, ztocDigest digest.Digest, desc layer.Descriptor) (*index.Layer, error) {
	if err := layer.CheckMediaType(desc.MediaType); err != nil {
		return nil, err
	}
	if strings.HasSuffix(desc.MediaType, "zstd") {
		return nil, invalid(errors.New("there are no ztocs of zstd layers"))
	}
	if err := ztocDigest.Validate(); err != nil {
		return nil, invalid(err)
	}
	if got := ztocDigest.Algorithm().FromBytes(ztoc); got != ztocDigest {
		return nil, fmt.Errorf("its content has digest %s: %w", got, errdefs.ErrDataLoss)
	}
	p := parser{buf: newBuffer(ztoc)}
	p.layer.Blob, p.layer.BlobSize = desc.Digest, desc.Size
	err := p.parse()
	if p.buf.err != nil { // what parse made of it does not matter
		err = fmt.Errorf("not a ztoc, or damaged: %w", p.buf.err)
	}
	if err == nil {
		name(p.layer.Table.Chunks, ztocDigest)
		err = p.layer.Validate()
	}
	if err != nil {
		return nil, invalid(err)
	}
	return &p.layer, nil
}

// invalid marks an error as the fault of the ztoc.
func invalid(err error) error {
	if errdefs.IsInvalidArgument(err) {
		return err
	}
	return fmt.Errorf("%w: %w", err, errdefs.ErrInvalidArgument)
}

// name gives chunks their names: a digest of the ztoc's digest and the chunk's
// number. The ztoc decides which bytes a chunk has, whatever blob it is used
// for: spans that do not match it are refused.
func name(chunks []index.Chunk, ztoc digest.Digest) {
	b := append([]byte("tatami chunk of a SOCI ztoc, version 1\x00"), ztoc...)
	n := len(b)
	for i := range chunks {
		chunks[i].Sum = sha256.Sum256(binary.LittleEndian.AppendUint64(b[:n], uint64(i)))
	}
}

// parser makes a layer of a ztoc.
type parser struct {
	buf    *buffer
	layer  index.Layer
	layout index.Layout
	size   int64 // of the uncompressed tar, as far as its end mark
	end    int64 // of the last file's data in it
	data   int64 // bytes of files so far
}

func (p *parser) parse() error {
	root := p.buf.root()
	if v := root.text(ztocVersionField); v != ztocVersion {
		return fmt.Errorf("ztoc version %.20q is not supported, only %s", v, ztocVersion)
	}
	if n := root.long(ztocCompressed); n != p.layer.BlobSize {
		return fmt.Errorf("it is for a blob of %d bytes, the layer has %d", n, p.layer.BlobSize)
	}
	p.size = root.long(ztocUncompressed)
	if err := p.access(root.table(ztocInfo)); err != nil {
		return err
	}
	if err := root.table(ztocTOC).each(tocMetadata, p.entry); err != nil {
		return err
	}
	p.layer.Table.Algorithm = index.Vouched
	p.layer.Table.Size = p.layout.Size()
	return nil
}
