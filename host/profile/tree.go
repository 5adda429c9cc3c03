package profile

import (
	"path"
	"slices"
	"sort"
	"strings"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Layer is one layer of an image: its segment, and what it has.
type Layer struct {
	Segment index.ID
	Entries []index.Entry
}

// Tree finds the files of an image by their paths and by their bytes. It keeps the
// entries that it was given.
type Tree struct {
	layers []Layer          // the lowest first
	names  map[string]named // what an image shows, but for what whiteouts hide
}

// named is what a path stands for.
type named struct {
	layer int
	entry *index.Entry
}

// NewTree takes the layers of an image, the lowest first. A file that a higher layer
// deletes is still found: it costs a prefetch if somebody asks for it.
func NewTree(layers []Layer) *Tree {
	t := &Tree{layers: layers, names: map[string]named{}}
	for i, l := range layers {
		for k := range l.Entries {
			e := &l.Entries[k]
			if e.Kind != index.Whiteout && e.Kind != index.Opaque {
				t.names[e.Path] = named{i, e}
			}
		}
	}
	return t
}

// maxLinks bounds the links that lead to one file, as the kernel does (MAXSYMLINKS in
// its include/linux/namei.h).
const maxLinks = 40

// maxWalked bounds what is walked of paths for one list, in bytes of the names of all
// directories on the way: several times what a long list of deep files needs. An image and
// a list may be made for each other, to keep a node busy.
const maxWalked = 64 << 20

// Find returns where the content of files is, in the order of paths, and how many
// of the paths the image does not have as files, or would need more than maxWalked. Links
// are followed as in a container.
func (t *Tree) Find(paths []string) (found []Range, unknown int) {
	seen := map[place]bool{}
	walked := 0
	for _, p := range paths {
		f, ok := t.resolve(p, &walked)
		if !ok {
			unknown++
			continue
		}
		at := place{t.layers[f.layer].Segment, f.entry.Off}
		if f.entry.Size > 0 && !seen[at] {
			seen[at] = true
			found = append(found, Range{at.segment, at.off, f.entry.Size})
		}
	}
	return found, unknown
}

// resolve follows links to a file. walked counts.
func (t *Tree) resolve(name string, walked *int) (named, bool) {
	done, rest := "", name
	for links := 0; ; {
		word, after, more := strings.Cut(rest, "/")
		if *walked += len(done) + len(word) + 1; *walked > maxWalked {
			return named{}, false
		}
		at := path.Join(done, word)
		f, ok := t.names[at]
		for ; ok && f.entry.Kind == index.Hardlink && links < maxLinks; links++ {
			f, ok = t.names[f.entry.Link]
		}
		switch {
		case ok && f.entry.Kind == index.Symlink:
			if links++; links > maxLinks {
				return named{}, false
			}
			done, rest = "", inside(done, f.entry.Link, after)
		case more: // a directory, which layers need not name
			done, rest = at, after
		default:
			return f, ok && f.entry.Kind == index.File
		}
	}
}

// inside is where a link in the directory dir leads, with rest behind it; not out of the
// image.
func inside(dir, link, rest string) string {
	if !strings.HasPrefix(link, "/") {
		link = dir + "/" + link
	}
	return strings.TrimPrefix(path.Join("/", link, rest), "/")
}

// Paths lists the files that ranges lie in, in their order, none twice.
func (t *Tree) Paths(ranges []Range) []string {
	files := map[index.ID][]*index.Entry{}
	for _, l := range t.layers {
		if files[l.Segment] == nil { // the same layer twice is one segment
			files[l.Segment] = byOffset(l.Entries)
		}
	}
	seen := map[*index.Entry]bool{}
	var out []string
	for _, r := range ranges {
		in := files[r.Segment]
		from := sort.Search(len(in), func(i int) bool { return in[i].Off+in[i].Size > r.Off })
		for _, e := range in[from:] {
			if e.Off >= r.End() {
				break
			}
			if !seen[e] {
				seen[e] = true
				out = append(out, e.Path)
			}
		}
	}
	return out
}

// byOffset are the files with content.
func byOffset(entries []index.Entry) []*index.Entry {
	out := []*index.Entry{}
	for i := range entries {
		if e := &entries[i]; e.Kind == index.File && e.Size > 0 {
			out = append(out, e)
		}
	}
	slices.SortFunc(out, func(a, b *index.Entry) int { return int(min(max(a.Off-b.Off, -1), 1)) })
	return out
}
