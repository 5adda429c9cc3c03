package imageindex

import (
	"fmt"
	"os"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/pathlist"
)

// ReadProfile reads a plain list of paths, one a line, as stargz-snapshotter and
// nydus use them. Empty lines and those that begin with # do not count.
func ReadProfile(name string) ([]string, error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, fmt.Errorf("read profile: %w", err)
	}
	defer file.Close()
	paths, err := pathlist.Read(file)
	if err != nil {
		return nil, fmt.Errorf("read profile %s: %w", name, err)
	}
	return paths, nil
}

// prefetch finds the files of a profile among a layer's entries. Files that
// follow each other in the segment make one range.
func prefetch(entries []index.Entry, paths []string) []index.Range {
	files := map[string]*index.Entry{}
	for i := range entries {
		if e := &entries[i]; e.Kind == index.File && e.Size > 0 {
			files[e.Path] = e // the last one is what the layer shows
		}
	}
	var out []index.Range
	for _, path := range paths {
		e := files[path]
		if e == nil {
			continue
		}
		delete(files, path)
		if n := len(out); n > 0 && index.RoundUp(out[n-1].Off+out[n-1].Len) == e.Off {
			out[n-1].Len = e.Off + e.Size - out[n-1].Off
			continue
		}
		if len(out) == index.MaxPrefetch {
			break // who lists more reads most of the layer
		}
		out = append(out, index.Range{Off: e.Off, Len: e.Size})
	}
	return out
}
