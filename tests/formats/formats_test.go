package formats

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/tests/treecmp"
)

// format is a way to store an image.
type format struct {
	name string
	// layers are the edits of an image's layers without which the format, or
	// its program, cannot hold them; none of them hides anything of ours.
	layers []func(tar []byte) edit
	// limit alters what is expected where the format stores less.
	limit func(*treecmp.Node)
	// single takes the first layer only: where the format's program merges the
	// layers, what comes of whiteouts and implied directories is its doing.
	single bool
}

// formats are gzip layers, which the images are made with, the same under
// Docker's media types, and what tools/demo/formats.sh makes of them.
var formats = []format{
	{name: "gzip"},
	{name: "docker"},
	{name: "tar"},
	{name: "zstd"},
	{name: "zstd-frames"},
	{name: "zstdchunked", layers: []func([]byte) edit{text, once}},
	{name: "zstdchunked-1", layers: []func([]byte) edit{text}, limit: noEmptyAttributes},
	{name: "zstdchunked-stargz", layers: []func([]byte) edit{text, once}, limit: wholeSeconds},
	{name: "estargz", layers: []func([]byte) edit{text, once}, limit: wholeSeconds},
	{name: "estargz-inner", layers: []func([]byte) edit{text, once}, limit: wholeSeconds},
	{name: "estargz-external", layers: []func([]byte) edit{text, once}, limit: wholeSeconds},
	{name: "nydus5", layers: []func([]byte) edit{once, nydusTakes, nydus5Takes}, limit: nydusStores, single: true},
	{name: "nydus6", layers: []func([]byte) edit{once, nydusTakes}, limit: nydusStores, single: true},
	{name: "nydus6-lz4", layers: []func([]byte) edit{once, nydusTakes}, limit: nydusStores, single: true},
	{name: "nydus6-none", layers: []func([]byte) edit{once, nydusTakes}, limit: nydusStores, single: true},
	{name: "nydus-ref", layers: []func([]byte) edit{once, nydusTakes}, limit: nydusStores, single: true},
}

// wholeSeconds is how the estargz library writes times into its tables.
func wholeSeconds(n *treecmp.Node) {
	n.Sec, n.Nsec = time.Unix(n.Sec, n.Nsec).Round(time.Second).Unix(), 0
}

// noEmptyAttributes is what skopeo 1.9 writes of extended attributes.
func noEmptyAttributes(n *treecmp.Node) {
	n.Xattrs = maps.Clone(n.Xattrs)
	maps.DeleteFunc(n.Xattrs, func(_, value string) bool { return value == "" })
	if len(n.Xattrs) == 0 {
		n.Xattrs = nil
	}
}

// nydusStores is what nydus-image 2.2 reads of a tar's headers: times in whole
// seconds and owners, without what only a PAX record can hold.
func nydusStores(n *treecmp.Node) {
	const ustar, ustarTime = 0o7777777, 0o77777777777
	n.Nsec = 0
	if n.Sec < 0 || n.Sec > ustarTime {
		n.Sec = 0
	}
	if n.UID > ustar {
		n.UID = 0
	}
	if n.GID > ustar {
		n.GID = 0
	}
}

// edit makes the layers of an image ones that the format can hold.
func (f format) edit(t *testing.T, tars [][]byte) [][]byte {
	t.Helper()
	if f.single {
		tars = tars[:1]
	}
	for _, e := range f.layers {
		tars = edited(t, tars, e)
	}
	return tars
}

// expect is what the format can show of a tree.
func (f format) expect(tree treecmp.Tree) treecmp.Tree {
	if f.limit == nil {
		return tree
	}
	limited := treecmp.Tree{}
	for name, n := range tree {
		f.limit(&n)
		limited[name] = n
	}
	return limited
}

// push makes an image of the layers in the format, pushes it and returns its
// reference.
func (f format) push(t *testing.T, reg registry, tars [][]byte) string {
	t.Helper()
	layout := writeLayout(t, tars)
	ref := reg.host + "/" + f.name
	switch f.name {
	case "gzip":
		reg.push(t, layout, f.name, "v1")
		return ref + ":v1"
	case "docker":
		run(t, nil, "skopeo", "copy", "--quiet", "--format", "v2s2", "--dest-tls-verify=false", "oci:"+layout+":latest", "docker://"+ref+":v1")
		return ref + ":v1"
	case "nydus-ref": // its data stays in the image it was made of
		reg.push(t, layout, f.name, "gzip")
	}
	out := t.TempDir()
	run(t, tools(), "../../tools/demo/formats.sh", layout, out, f.name)
	if toc := filepath.Join(out, f.name+"-toc"); exists(toc) {
		reg.push(t, toc, f.name, "v1-esgztoc")
	}
	reg.push(t, filepath.Join(out, f.name), f.name, "v1")
	return ref + ":v1"
}

// tools is where formats.sh keeps and looks for programs that no package has.
func tools() []string {
	cache := os.Getenv("CACHE")
	if cache == "" {
		cache, _ = filepath.Abs("../../.cache") // Getwd has worked for the test binary
	}
	env := []string{"CACHE=" + cache}
	if built := filepath.Join(cache, "nydus/bin/nydus-image"); os.Getenv("TATAMI_NYDUS_IMAGE") == "" && exists(built) {
		env = append(env, "TATAMI_NYDUS_IMAGE="+built)
	}
	return env
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// needFormat skips what this machine has no program for.
func needFormat(t *testing.T, f format) {
	t.Helper()
	need(t, "docker-registry", "skopeo", "pzstd", "mmdebstrap")
	if len(f.name) < 5 || f.name[:5] != "nydus" || os.Getenv("TATAMI_NYDUS_IMAGE") != "" || len(tools()) > 1 {
		return
	}
	if _, err := exec.LookPath("nydus-image"); err != nil {
		t.Skip("needs nydus-image: `make nydus` builds it, or set TATAMI_NYDUS_IMAGE")
	}
}
