package guestimage

import (
	"maps"
	"path"
	"slices"
)

// file is one file of an image. Its owner is root and its time 0.
type file struct {
	mode uint16 // permissions
	data []byte
	link string // target of a symbolic link; mode and data do not count then
}

// tree holds the files of an image by their path, without a leading slash.
// Directories are those of the paths, mode 0755.
type tree map[string]file

func (t tree) text(name, data string)           { t[name] = file{mode: 0o644, data: []byte(data)} }
func (t tree) program(name string, data []byte) { t[name] = file{mode: 0o755, data: data} }
func (t tree) symlink(name, target string)      { t[name] = file{link: target} }

// dirs lists the directories, each before what is in it; the root is not one.
func (t tree) dirs() []string {
	all := make(map[string]bool)
	for name := range t {
		for d := path.Dir(name); d != "."; d = path.Dir(d) {
			all[d] = true
		}
	}
	return slices.Sorted(maps.Keys(all))
}

// names lists the files.
func (t tree) names() []string { return slices.Sorted(maps.Keys(t)) }
