package node

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"
)

// files is the node's directory; the package comment lists what is in it.
type files string

func (f files) store() string { return filepath.Join(string(f), "store") }
func (f files) temp() string  { return filepath.Join(string(f), "tmp") }
func (f files) refs() string  { return filepath.Join(string(f), "refs") }

func (f files) layers() string { return filepath.Join(string(f), "layers") }
func (f files) images() string { return filepath.Join(string(f), "images") }

// layer and image are paths of valid digests.
func (f files) layer(d digest.Digest) string {
	return filepath.Join(f.layers(), d.Algorithm().String(), d.Encoded())
}

func (f files) image(d digest.Digest) string {
	return filepath.Join(f.images(), d.Algorithm().String(), d.Encoded())
}

// create makes the directories and removes what an earlier process left half
// done.
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
