package node

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// files is the node's directory; the package comment lists what is in it.
type files string

func (f files) store() string { return filepath.Join(string(f), "store") }
func (f files) temp() string  { return filepath.Join(string(f), "tmp") }
func (f files) refs() string  { return filepath.Join(string(f), "refs") }
func (f files) blobs() string { return filepath.Join(string(f), "blobs") }

func (f files) layers() string { return filepath.Join(string(f), "layers") }
func (f files) images() string { return filepath.Join(string(f), "images") }

// layer and image are paths of valid digests.
func (f files) layer(d digest.Digest) string {
	return filepath.Join(f.layers(), d.Algorithm().String(), d.Encoded())
}

func (f files) image(d digest.Digest) string {
	return filepath.Join(f.images(), d.Algorithm().String(), d.Encoded())
}

// layout is the content of the file that marks a directory as a node's.
const layout = "tatami node, layout 1\n"

func (f files) mark() string { return filepath.Join(string(f), "layout") }

// claim marks the directory as a node's. It refuses one that another program
// keeps things in under the same names: what the node does not know there, it
// removes.
func (f files) claim() error {
	data, err := readBounded(f.mark(), int64(len(layout)))
	if err == nil && string(data) == layout {
		return nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("%s does not say %q: it was written by another version or program, choose another directory: %w",
			f.mark(), strings.TrimSpace(layout), errdefs.ErrFailedPrecondition)
	}
	for _, name := range []string{f.temp(), f.refs(), f.images(), f.layers(), f.store(), f.blobs()} {
		if _, err := os.Lstat(name); !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("there is %s already and it is not of a node; choose an empty directory: %w", name, errdefs.ErrFailedPrecondition)
		}
	}
	if err := os.MkdirAll(string(f), 0o700); err != nil {
		return err
	}
	// Durable at once: without it, what is written later would look foreign.
	file, err := os.CreateTemp(string(f), "layout-*")
	if err != nil {
		return err
	}
	err = writeSync(file, []byte(layout))
	if err == nil {
		err = os.Rename(file.Name(), f.mark())
	}
	if err != nil {
		return errors.Join(err, os.Remove(file.Name()))
	}
	return syncDir(string(f))
}

// create makes the directories and removes what an earlier process left half
// done. Precondition: claim succeeded.
func (f files) create() error {
	if err := os.RemoveAll(f.temp()); err != nil {
		return err
	}
	for _, dir := range []string{f.temp(), f.refs(), f.images(), f.layers()} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	return nil
}

// write makes name hold data. A crash leaves either the old or the new content.
func (f files) write(name string, data []byte) (err error) {
	tmp, err := os.CreateTemp(f.temp(), "file-*")
	if err != nil {
		return err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, os.Remove(tmp.Name()))
		}
	}()
	if err := writeSync(tmp, data); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	if err := os.Rename(tmp.Name(), name); err != nil {
		return err
	}
	return syncDir(filepath.Dir(name))
}

// writeDir makes the directory name hold these files and nothing else; its
// rename makes it appear. A directory that is there stays as it is.
func (f files) writeDir(name string, content map[string][]byte) error {
	tmp, err := os.MkdirTemp(f.temp(), "dir-*")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tmp)
	for base, data := range content {
		file, err := os.OpenFile(filepath.Join(tmp, base), os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
		if err != nil {
			return err
		}
		if err := writeSync(file, data); err != nil {
			return err
		}
	}
	if err := syncDir(tmp); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return err
	}
	if err := os.Rename(tmp, name); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	return syncDir(filepath.Dir(name))
}

// writeSync writes data, makes it durable and closes the file.
func writeSync(file *os.File, data []byte) error {
	_, err := file.Write(data)
	if err == nil {
		err = file.Sync()
	}
	return errors.Join(err, file.Close())
}

func syncDir(name string) error {
	dir, err := os.Open(name)
	if err != nil {
		return err
	}
	defer dir.Close()
	return dir.Sync()
}

// readBounded reads a file that is expected to have at most limit bytes.
func readBounded(name string, limit int64) ([]byte, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	data, err := io.ReadAll(io.LimitReader(file, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = fmt.Errorf("read %s: longer than %d bytes", name, limit)
	}
	return data, err
}
