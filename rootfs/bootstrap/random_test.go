package bootstrap_test

import (
	"archive/tar"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/erofs/go-erofs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/bootstrap"
	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tests/treecmp"
)

// Random layers of few names, so that everything meets everything, look the
// same through overlayfs; and what Build refuses, the unpacker refuses.
func TestRandomLayers(t *testing.T) {
	dir := torture.TempFS(t)
	rounds := 100
	if testing.Short() {
		rounds = 10
	}
	for seed := range rounds {
		if t.Run(fmt.Sprint(seed), func(t *testing.T) {
			g := &generator{t: t, r: rand.New(rand.NewPCG(uint64(seed), 1)), lowerLinks: seed%3 == 0}
			for range 2 + seed%3 {
				g.layer()
			}
			g.compare(filepath.Join(dir, fmt.Sprint(seed)))
		}); t.Failed() {
			t.FailNow() // one is enough to look at
		}
	}
}

type op func(*torture.Tar)

type generator struct {
	t          *testing.T
	r          *rand.Rand
	lowerLinks bool // also hard links to lower layers
	layers     [][]op
	log        [][]string
	own        []string // files that the layer has made so far
	refused    [][]op   // what follows the layers before and cannot be applied
}

func (g *generator) pick(from ...string) string { return from[g.r.IntN(len(from))] }

func (g *generator) path() string {
	p := g.pick("a", "b", "c", "-")
	for g.r.IntN(3) > 0 && len(p) < 7 {
		p += "/" + g.pick("a", "b", "c", "-")
	}
	return p
}

// layer adds a layer of entries that can be applied.
func (g *generator) layer() {
	n := len(g.layers)
	g.layers, g.log, g.own = append(g.layers, nil), append(g.log, nil), nil
	for left := 4 + g.r.IntN(14); left > 0; left-- {
		what, add := g.op()
		if left == 1 && g.lowerLinks {
			// The last one, as from then on the unpacker finds the file that was
			// copied up for the link where the layer itself has nothing.
			what, add = g.link(g.path(), g.path())
		}
		g.layers[n] = append(g.layers[n], add)
		layers, _ := parse(g.t, g.tars(g.layers))
		if _, err := bootstrap.Build(manifest(), layers); err == nil {
			g.log[n] = append(g.log[n], what)
			continue
		}
		if g.r.IntN(4) == 0 && g.refused == nil {
			g.refused = slices.Clone(g.layers)
			g.log[n] = append(g.log[n], "refused: "+what)
		}
		g.layers[n] = slices.Clip(g.layers[n][:len(g.layers[n])-1])
	}
}

func (g *generator) tars(layers [][]op) [][]byte {
	var out [][]byte
	for _, ops := range layers {
		w := torture.NewTar()
		for _, add := range ops {
			add(w)
		}
		out = append(out, w.Bytes())
	}
	return out
}

// op makes up one entry.
func (g *generator) op() (string, op) {
	p := g.path()
	at := torture.At(g.r.Int64N(1e9), g.r.Int64N(1e9))
	mode := torture.Mode(int64(g.r.IntN(0o10000)))
	attr := func(*tar.Header) {}
	if g.r.IntN(4) == 0 {
		attr = torture.Attr("user."+g.pick("x", "y"), g.pick("", "v"))
	}
	switch k := g.r.IntN(14); {
	case k < 3:
		g.own = append(g.own, p)
		content := strings.Repeat(p, g.r.IntN(3000))
		return "file " + p, func(w *torture.Tar) { w.File(p, content, at, mode, attr) }
	case k < 6:
		return "dir " + p, func(w *torture.Tar) { w.Dir(p, at, mode, attr) }
	case k < 8:
		target := g.pick("a", "b", "/c", "../a", "a/b", "/b/c", "b/../c", ".", "../../-", "c/a/b")
		return "symlink " + p + " to " + target, func(w *torture.Tar) { w.Symlink(p, target, at) }
	case k < 9:
		if len(g.own) == 0 {
			return g.op()
		}
		return g.link(p, g.pick(g.own...))
	case k < 12:
		dir, name := filepath.Split(p)
		return "whiteout " + p, func(w *torture.Tar) { w.File(dir+".wh."+name, "") }
	case k < 13:
		return "opaque " + p, func(w *torture.Tar) { w.File(p+"/.wh..wh..opq", "") }
	}
	return "fifo " + p, func(w *torture.Tar) { w.Device(tar.TypeFifo, p, 0, 0, at, mode) }
}

func (g *generator) link(p, target string) (string, op) {
	return "link " + p + " to " + target, func(w *torture.Tar) { w.Link(p, target) }
}

func (g *generator) compare(dir string) {
	t := g.t
	t.Cleanup(func() {
		if t.Failed() {
			for n, l := range g.log {
				t.Logf("layer %d:\n\t%s", n, strings.Join(l, "\n\t"))
			}
		}
	})
	for _, d := range []string{dir, dir + "/bad"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	tars := g.tars(g.layers)
	want := overlay(t, tars, dir)
	file, _ := imageFile(t, tars, t.TempDir())
	got := snapshot(t, torture.MountImage(t, file, dir, false))
	ignore := []treecmp.Field{treecmp.Nlink}
	if g.lowerLinks {
		// Copying a file up for a link takes only that one of its names along,
		// with us it takes them all.
		ignore = append(ignore, treecmp.Group)
	}
	if !opaqueRoot(dir, len(tars)) {
		report(t, "overlayfs, image", treecmp.Diff(want, got, ignore...))
	}
	if g.refused != nil {
		if _, err := torture.Unpack(dir+"/bad", g.tars(g.refused)); err == nil {
			t.Error("Build refuses what can be unpacked")
		}
	}
}

// opaqueRoot says whether one of the unpacked layers is opaque as a whole,
// which the kernel, unlike us, does not ask for.
func opaqueRoot(dir string, layers int) bool {
	for n := range layers {
		if _, err := unix.Lgetxattr(fmt.Sprintf("%s/%d-layer", dir, n), "trusted.overlay.opaque", nil); err == nil {
			return true
		}
	}
	return false
}

// FuzzBuild makes entries of arbitrary bytes: whatever Build accepts has to be
// an image that another reader can walk.
func FuzzBuild(f *testing.F) {
	f.Add([]byte("\x02\x00a\x00\x01\x00b\x00\x05\x01a/b\x00"), uint8(3))
	f.Add([]byte("\x03\x07a\x00\x03\x07b\x00\x01\x00c\x00\x08\x00c\x00\x09\x00d\x00"), uint8(1))
	f.Fuzz(func(t *testing.T, b []byte, split uint8) {
		entries := entriesOf(b)
		n := min(int(split), len(entries))
		img, err := bootstrap.Build(manifest(), []*index.Layer{layerOf(entries[:n]...), layerOf(entries[n:]...)})
		if err != nil {
			return
		}
		if err := img.Validate(); err != nil {
			t.Fatal(err)
		}
		image, err := erofs.Open(strings.NewReader(string(img.Bootstrap)))
		if err != nil {
			t.Fatal(err)
		}
		if err := walk(image); err != nil {
			t.Fatal(err)
		}
	})
}

// entriesOf cuts bytes at zeros into entries: kind, attributes, path.
func entriesOf(b []byte) []index.Entry {
	var entries []index.Entry
	for s := range strings.SplitSeq(string(b), "\x00") {
		if len(s) < 2 || len(entries) > 1000 {
			continue
		}
		e := index.Entry{Kind: index.Kind(s[0] % 10), Mode: uint16(s[1]), Path: s[2:]}
		path, link, _ := strings.Cut(e.Path, ">")
		switch e.Kind {
		case index.Symlink, index.Hardlink:
			e.Path, e.Link = path, link
		case index.Char, index.Block:
			e.Major, e.Minor = uint32(s[1]), uint32(len(s))
		case index.Dir, index.Fifo:
			e.Path = path
			e.Xattrs = []index.Xattr{{Name: "security.x", Value: strings.Repeat(link, 50)}}
		}
		entries = append(entries, e)
	}
	return entries
}
