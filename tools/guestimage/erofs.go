package guestimage

import (
	"crypto/sha256"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/bootstrap"
	"github.com/tatami-containers/tatami/rootfs/index"
)

// writeEROFS writes a tree as an uncompressed EROFS file system and returns its
// length in bytes, a multiple of index.BlockSize. Every kernel that has EROFS
// can mount it: it uses no feature that a kernel may lack.
func writeEROFS(w io.Writer, t tree) (size int64, err error) {
	img, files, err := layout(t)
	if err != nil {
		return 0, err
	}
	if _, err := w.Write(img.Bootstrap); err != nil {
		return 0, err
	}
	for _, data := range files {
		pad := index.RoundUp(int64(len(data))) - int64(len(data))
		if _, err := w.Write(data); err != nil {
			return 0, err
		}
		if _, err := w.Write(make([]byte, pad)); err != nil {
			return 0, err
		}
	}
	return img.Size(), nil
}

// layout gives everything its place: the metadata, and the contents of files in
// the order in which they follow.
func layout(t tree) (img *index.Image, files [][]byte, err error) {
	var l index.Layer
	var place index.Layout
	for _, d := range t.dirs() {
		l.Entries = append(l.Entries, index.Entry{Path: d, Kind: index.Dir, Mode: 0o755})
	}
	content := sha256.New()
	for _, name := range t.names() {
		f := t[name]
		if f.link != "" {
			l.Entries = append(l.Entries, index.Entry{Path: name, Kind: index.Symlink, Link: f.link})
			continue
		}
		n := int64(len(f.data))
		l.Entries = append(l.Entries, index.Entry{Path: name, Kind: index.File, Mode: f.mode, Size: n, Off: place.Place(n)})
		files = append(files, f.data)
		fmt.Fprintf(content, "%d:", n)
		content.Write(f.data)
	}
	l.Table.Size = place.Size()
	// The image's UUID is made of the metadata and of this digest.
	l.Blob = digest.NewDigest(digest.SHA256, content)
	img, err = bootstrap.Build(l.Blob, []*index.Layer{&l})
	return img, files, err
}
