package nydus

import (
	"fmt"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/layer"
)

// A format is a bootstrap whose superblock and tables were read: v5 or v6.
type format interface {
	blobs() []*blob
	algorithm() index.Algorithm
	// root is the number of the root directory.
	root() uint64
	// inode reads the inode of that number.
	inode(number uint64) (*inode, error)
	// list iterates over the directory d.
	list(d *inode) (children, error)
	// chunks calls add with the chunks of a file, from its beginning on.
	chunks(f *inode, add func(*record) error) error
	// prefetch lists numbers of inodes that a start is likely to read.
	prefetch() []uint64
}

// children are the names in a directory.
type children interface {
	// next returns a name and the number of its inode; false at the end.
	next() (name string, number uint64, ok bool, err error)
}

// inode is a file of any kind. What it has besides attributes is in the
// format's own form.
type inode struct {
	entry index.Entry // without Path and Off
	key   uint64      // the same for all names of a file
	links uint32      // how many names it has
	raw   content     // of the inode, from its beginning to the end of the bootstrap
	body  uint64      // what follows attributes: offset in raw, bytes
	union uint32      // v6: where the data is; v5: number of the first child
	count uint32      // v5: number of children or chunks
	inner bool        // v6: the end of the data follows the attributes
	mixed bool        // v5: there are holes between chunks
}

// Limits of an image. Real ones are far below.
const (
	maxText   = 512 << 20        // names, link targets and attributes, bytes
	maxChunks = index.MaxEntries // of all files, holes included
)

// builder makes a layer of a format.
type builder struct {
	format  format
	layers  []layer.Descriptor // of the manifest
	layer   index.Layer
	layout  index.Layout
	text    int64
	chunks  int
	names   map[uint64]int      // of files with several names: where in Entries the first is
	seen    map[uint64]struct{} // directories
	wanted  map[uint64]index.Range
	pending []directory
}

// directory is one that is being read.
type directory struct {
	path   string
	number uint64
	start  int64 // where its files begin in the segment
	list   children
}

// build reads the whole tree.
func build(f format, desc layer.Descriptor, layers []layer.Descriptor) (*index.Layer, error) {
	b := builder{format: f, layers: layers, names: map[uint64]int{}, seen: map[uint64]struct{}{}, wanted: map[uint64]index.Range{}}
	b.layer.Blob, b.layer.BlobSize = desc.Digest, desc.Size
	b.layer.Access.Format = index.Chunked
	b.layer.Table.Algorithm = f.algorithm()
	b.points()
	for _, n := range f.prefetch() {
		b.wanted[n] = index.Range{}
	}
	if err := b.tree(); err != nil {
		return nil, err
	}
	b.layer.Table.Size = b.layout.Size()
	b.prefetch()
	if err := b.layer.Validate(); err != nil {
		return nil, err
	}
	return &b.layer, nil
}

// points gives the layer the checkpoints of all blobs, and the blobs the
// number of their first.
func (b *builder) points() {
	for _, blob := range b.format.blobs() {
		if blob.meta != nil {
			blob.meta.first = uint32(len(b.layer.Access.Checkpoints))
			b.layer.Access.Checkpoints = append(b.layer.Access.Checkpoints, blob.meta.points...)
		}
	}
}

// tree goes through all directories, each before what it holds.
func (b *builder) tree() error {
	if err := b.add("", b.format.root()); err != nil {
		return fmt.Errorf("root: %w", err)
	}
	if len(b.pending) == 0 {
		return invalid("the root is not a directory")
	}
	for len(b.pending) > 0 {
		d := &b.pending[len(b.pending)-1]
		name, number, ok, err := d.list.next()
		if err != nil {
			return fmt.Errorf("directory %.255q: %w", d.path, err)
		}
		if !ok {
			b.note(d.number, index.Range{Off: d.start, Len: b.layout.Size() - d.start})
			b.pending = b.pending[:len(b.pending)-1]
			continue
		}
		path := name
		if d.path != "" {
			path = d.path + "/" + name
		}
		if err := b.add(path, number); err != nil {
			return fmt.Errorf("%.255q: %w", path, err)
		}
	}
	return nil
}

// add takes in one name.
func (b *builder) add(path string, number uint64) error {
	i, err := b.format.inode(number)
	if err != nil || i.entry.Kind == 0 {
		return err
	}
	i.entry.Path = path
	if err := b.account(&i.entry); err != nil {
		return err
	}
	switch {
	case i.entry.Kind == index.Dir:
		return b.directory(i, number)
	case i.links > 1:
		if first, ok := b.names[i.key]; ok {
			return b.link(path, number, first)
		}
		b.names[i.key] = len(b.layer.Entries)
	}
	if i.entry.Kind == index.File {
		if err := b.file(i, number); err != nil {
			return err
		}
	}
	b.layer.Entries = append(b.layer.Entries, i.entry)
	return nil
}

// account keeps the memory for entries within bounds.
func (b *builder) account(e *index.Entry) error {
	b.text += int64(len(e.Path) + len(e.Link))
	for _, x := range e.Xattrs {
		b.text += int64(len(x.Name) + len(x.Value))
	}
	switch {
	case len(e.Path) > index.MaxPath:
		return invalid("path of %d bytes is over %d", len(e.Path), index.MaxPath)
	case b.text > maxText:
		return invalid("names and attributes of the image are over %d bytes", maxText)
	case len(b.layer.Entries) >= index.MaxEntries:
		return invalid("the image has more than %d names", index.MaxEntries)
	}
	return nil
}

// directory begins a directory. Each can only be in one place, so that there
// is an end.
func (b *builder) directory(i *inode, number uint64) error {
	if _, ok := b.seen[number]; ok {
		return invalid("the directory is in two places")
	}
	b.seen[number] = struct{}{}
	list, err := b.format.list(i)
	if err != nil {
		return err
	}
	b.layer.Entries = append(b.layer.Entries, i.entry)
	b.pending = append(b.pending, directory{i.entry.Path, number, b.layout.Size(), list})
	return nil
}

// link adds another name of the file whose entry has the number first.
func (b *builder) link(path string, number uint64, first int) error {
	e := &b.layer.Entries[first]
	b.layer.Entries = append(b.layer.Entries, index.Entry{Path: path, Kind: index.Hardlink, Link: e.Path})
	b.note(number, index.Range{Off: e.Off, Len: index.RoundUp(e.Size)})
	return nil
}

// file lays out a file and adds its chunks.
func (b *builder) file(i *inode, number uint64) error {
	e := &i.entry
	if e.Size < 0 || e.Size > index.MaxSegment-b.layout.Size() {
		return invalid("size of %d bytes", e.Size)
	}
	e.Off = b.layout.Place(e.Size)
	b.note(number, index.Range{Off: e.Off, Len: index.RoundUp(e.Size)})
	end := uint64(0) // of the chunks so far, in the file
	err := b.format.chunks(i, func(r *record) error {
		if b.chunks++; b.chunks > maxChunks {
			return invalid("the image has more than %d chunks", maxChunks)
		}
		if r.fileOff < end || (r.fileOff > end && !i.mixed) || r.fileOff > uint64(e.Size) || uint64(r.plain) > uint64(e.Size)-r.fileOff {
			return invalid("chunk of %d bytes at %d in a file of %d, whose chunks so far reach to %d", r.plain, r.fileOff, e.Size, end)
		}
		end = r.fileOff + uint64(r.plain)
		return b.chunk(r, e.Off+int64(r.fileOff))
	})
	if err == nil && end < uint64(e.Size) && !i.mixed {
		return invalid("chunks cover %d of %d bytes", end, e.Size)
	}
	return err
}

// chunk adds a chunk that begins at off in the segment.
func (b *builder) chunk(r *record, off int64) error {
	if r.flags&chunkHole != 0 {
		return nil
	}
	blobs := b.format.blobs()
	if uint64(r.blob) >= uint64(len(blobs)) {
		return invalid("chunk in blob %d of %d", r.blob, len(blobs))
	}
	blob := blobs[r.blob]
	if r.plain == 0 || r.plain > index.MaxChunk {
		return invalid("chunk of %d bytes; convert the image with chunks of 1 to %d bytes", r.plain, index.MaxChunk)
	}
	p, err := blob.piece(r)
	if err != nil {
		return err
	}
	if p.Blob, err = b.number(blob); err != nil {
		return err
	}
	b.layer.Table.Chunks = append(b.layer.Table.Chunks, index.Chunk{Off: off, Len: int64(r.plain), Sum: r.sum})
	b.layer.Access.Pieces = append(b.layer.Access.Pieces, p)
	return nil
}

// number is the number of a blob in Access.Blobs, where it is put when its
// first chunk is found: not all that a bootstrap lists are used.
func (b *builder) number(blob *blob) (uint16, error) {
	if blob.number != 0 {
		return blob.number, nil
	}
	ref, err := b.find(blob)
	if err != nil {
		return 0, err
	}
	b.layer.Access.Blobs = append(b.layer.Access.Blobs, ref)
	if len(b.layer.Access.Blobs) > maxBlobs {
		return 0, invalid("chunks are in more than %d blobs", maxBlobs)
	}
	blob.number = uint16(len(b.layer.Access.Blobs))
	return blob.number, nil
}

// maxBlobs is how many blobs Access can have.
const maxBlobs = 4096

// find looks for a blob among the layers of the manifest.
func (b *builder) find(blob *blob) (index.BlobRef, error) {
	d, err := blob.digest()
	if err != nil {
		return index.BlobRef{}, err
	}
	for _, desc := range b.layers {
		if desc.Digest == d {
			return index.BlobRef{Digest: d, Size: desc.Size}, nil
		}
	}
	if blob.features&featureSeparate != 0 {
		return index.BlobRef{Digest: d, Size: int64(blob.size)}, nil
	}
	return index.BlobRef{}, invalid("blob %s is not a layer of the manifest; push the image with all its blobs", d)
}

// note remembers where the data of an inode is if it is to be prefetched.
func (b *builder) note(number uint64, r index.Range) {
	if _, ok := b.wanted[number]; ok {
		b.wanted[number] = r
	}
}

// prefetch puts the ranges that the bootstrap lists into the layer. One that
// lists the root says nothing of what a start reads; converters write it by
// default.
func (b *builder) prefetch() {
	var out []index.Range
	for _, number := range b.format.prefetch() {
		r := b.wanted[number]
		if r.Len == 0 || number == b.format.root() {
			continue
		}
		b.wanted[number] = index.Range{} // once
		if n := len(out) - 1; n >= 0 && out[n].Off+out[n].Len == r.Off {
			out[n].Len += r.Len
		} else {
			out = append(out, r)
		}
	}
	b.layer.Prefetch = out[:min(len(out), index.MaxPrefetch)]
}
