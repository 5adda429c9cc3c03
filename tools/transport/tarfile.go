package transport

import (
	"archive/tar"
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"strings"

	"github.com/containerd/errdefs"
)

const (
	maxEntries = 256 << 10 // of an archive
	maxHops    = 8         // from link to link
)

// tarFile is the files of a tar archive, which stay where they are in it.
type tarFile struct {
	f       *os.File
	entries map[string]entry // by cleaned name
}

// entry is a range of the archive, or a link.
type entry struct {
	off, size int64  // bytes
	link      string // cleaned name that is meant, or ""
}

// openTar lists the entries of an archive, which must not be compressed.
func openTar(name string) (*tarFile, error) {
	f, err := os.Open(name)
	if errors.Is(err, os.ErrNotExist) {
		err = fmt.Errorf("%w: %w", err, errdefs.ErrNotFound)
	}
	if err != nil {
		return nil, err
	}
	t := &tarFile{f: f, entries: map[string]entry{}}
	if err := t.scan(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return t, nil
}

// compressions are known by their first bytes: RFC 1952, RFC 8878, xz's and
// bzip2's formats.
var compressions = []struct{ magic, tool string }{
	{"\x1f\x8b\x08", "gunzip"}, {"\x28\xb5\x2f\xfd", "unzstd"}, {"\xfd7zXZ\x00", "unxz"}, {"BZh", "bunzip2"},
}

func (t *tarFile) scan() error {
	head := make([]byte, 8)
	n, err := t.f.ReadAt(head, 0)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	for _, c := range compressions {
		if bytes.HasPrefix(head[:n], []byte(c.magic)) {
			return fmt.Errorf("the archive is compressed, so nothing can be found in it; decompress it first: %s -k %s: %w", c.tool, t.f.Name(), errdefs.ErrInvalidArgument)
		}
	}
	// The reader has no buffer of its own and seeks over contents.
	tr := tar.NewReader(t.f)
	for {
		hdr, err := tr.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return fmt.Errorf("read tar: %w: %w", err, errdefs.ErrInvalidArgument)
		}
		if err := t.add(hdr); err != nil {
			return fmt.Errorf("entry %.200q: %w", hdr.Name, err)
		}
	}
}

// add takes up the entry whose header was just read. Of equal names the last counts.
func (t *tarFile) add(hdr *tar.Header) error {
	if len(t.entries) >= maxEntries {
		return fmt.Errorf("there are more than %d entries: %w", maxEntries, errdefs.ErrInvalidArgument)
	}
	name := cleanName(hdr.Name)
	switch hdr.Typeflag {
	case tar.TypeReg:
		off, err := t.f.Seek(0, io.SeekCurrent)
		if err != nil {
			return err
		}
		if hdr.PAXRecords["GNU.sparse.major"] != "" || hdr.PAXRecords["GNU.sparse.map"] != "" {
			return fmt.Errorf("it is a sparse file; pack the archive without them: %w", errdefs.ErrInvalidArgument)
		}
		t.entries[name] = entry{off: off, size: hdr.Size}
	case tar.TypeSymlink:
		// docker save before 25 links equal layers, by "../<id>/layer.tar".
		t.entries[name] = entry{link: cleanName(path.Join(path.Dir("/"+name), hdr.Linkname))}
	case tar.TypeLink:
		t.entries[name] = entry{link: cleanName(hdr.Linkname)}
	}
	return nil
}

// cleanName is a name as seen from the top of the archive.
func cleanName(name string) string { return strings.TrimPrefix(path.Clean("/"+name), "/") }

func (t *tarFile) open(name string) (file, error) {
	e, ok := t.entries[cleanName(name)]
	for hops := 0; ok && e.link != "" && hops < maxHops; hops++ {
		e, ok = t.entries[e.link]
	}
	if !ok || e.link != "" {
		return nil, fmt.Errorf("the archive has no file %.200q: %w", name, errdefs.ErrNotFound)
	}
	return tarEntry{io.NewSectionReader(t.f, e.off, e.size)}, nil
}

func (t *tarFile) Close() error { return t.f.Close() }

// tarEntry is a file that is closed with its archive.
type tarEntry struct{ *io.SectionReader }

func (tarEntry) Close() error { return nil }
