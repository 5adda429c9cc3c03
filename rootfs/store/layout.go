package store

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// layout knows the names of a store's files; see the package comment.
type layout string

func (l layout) temp() string     { return filepath.Join(string(l), "tmp") }
func (l layout) images() string   { return filepath.Join(string(l), "images") }
func (l layout) segments() string { return filepath.Join(string(l), "segments") }
func (l layout) shared() string   { return filepath.Join(string(l), "shared") }

func (l layout) image(manifest digest.Digest, suffix string) string {
	return filepath.Join(l.images(), manifest.Encoded()+suffix)
}

func (l layout) segment(id index.ID, suffix string) string {
	return filepath.Join(l.segments(), id.Encoded()+suffix)
}

// Suffixes of the files of images and segments.
const (
	recordFile = ".json"
	bootFile   = ".boot"
	wholeFile  = ".erofs"
	tableFile  = ".table"
	dataFile   = ".data"
	bitsFile   = ".bits"
	homeFile   = ".home"
	linksFile  = ".links"
	useFile    = ".use"
)

func (l layout) make() error {
	for _, dir := range []string{l.temp(), l.images(), l.segments(), l.shared()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	return nil
}

// clearTemp removes what an earlier process was writing when it ended.
func (l layout) clearTemp() error {
	entries, err := os.ReadDir(l.temp())
	if err != nil {
		return err
	}
	for _, e := range entries {
		if err := os.Remove(filepath.Join(l.temp(), e.Name())); err != nil {
			return err
		}
	}
	return nil
}

// put makes the file name with data. Readers see all of it or what was there
// before; a crash of the machine may damage it, so it is for what is checked
// when it is read and can be made again.
func (l layout) put(name string, data []byte) error {
	f, err := os.CreateTemp(l.temp(), "put-")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	return l.rename(f, name, err)
}

// write makes the file name with data, or leaves what was there: after a crash
// of the machine it is one or the other.
func (l layout) write(name string, data []byte) error {
	f, err := os.CreateTemp(l.temp(), "write-")
	if err != nil {
		return err
	}
	_, err = f.Write(data)
	if err == nil {
		err = f.Sync()
	}
	return l.place(f, name, err)
}

// place closes f, a synced file in temp, and gives it its name durably, unless
// err says that it is no good.
func (l layout) place(f *os.File, name string, err error) error {
	if err := l.rename(f, name, err); err != nil {
		return err
	}
	return syncDir(filepath.Dir(name))
}

func (l layout) rename(f *os.File, name string, err error) error {
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), name)
	}
	if err != nil {
		_ = os.Remove(f.Name()) // tmp is emptied at the next Open
		return fmt.Errorf("write %s: %w", name, err)
	}
	return nil
}

// remove removes files in the given order, each durably before the next. It is
// no error when one does not exist.
func remove(names ...string) error {
	for _, name := range names {
		err := os.Remove(name)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err == nil {
			err = syncDir(filepath.Dir(name))
		}
		if err != nil {
			return err
		}
	}
	return nil
}

func syncDir(name string) error {
	d, err := os.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// stems lists the names in dir up to their first dot, each once, with the
// suffixes that it has.
func stems(dir string) (map[string][]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	out := map[string][]string{}
	for _, e := range entries {
		stem, suffix, _ := strings.Cut(e.Name(), ".")
		out[stem] = append(out[stem], "."+suffix)
	}
	return out, nil
}
