package index

import "github.com/opencontainers/go-digest"

// Image is one flat EROFS image as an address space: the bootstrap at offset
// 0, then the segments, each where its Off says.
type Image struct {
	Manifest  digest.Digest // of the image manifest that this was made for
	Bootstrap []byte        // EROFS metadata, whole blocks
	Segments  []Segment     // by rising Off, one for each distinct table, without gaps
}

// Segment is one segment's place in an image.
type Segment struct {
	ID    ID            // digest of the encoded Table
	Layer digest.Digest // blob of the (first) layer that it belongs to
	Off   int64         // in the image, bytes, a multiple of BlockSize
	Table *Table
	// Prefetch lists what a start is likely to read, in ranges of the segment,
	// the first first. A hint of the publisher.
	Prefetch []Range
}

// End is the offset behind the segment in the image.
func (s *Segment) End() int64 { return s.Off + s.Table.Size }

// Size is the length of the image in bytes.
func (i *Image) Size() int64 {
	if n := len(i.Segments); n > 0 {
		return i.Segments[n-1].End()
	}
	return int64(len(i.Bootstrap))
}

// Media types of the index artifact: an OCI manifest with ArtifactType whose
// subject is the image manifest and whose first layer is an ImageType blob.
const (
	ArtifactType = "application/vnd.tatami.index.v1"
	ImageType    = "application/vnd.tatami.index.image.v1"
	LayerType    = "application/vnd.tatami.index.layer.v1"
)
