package nydus_test

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/containerd/stargz-snapshotter/estargz"
	"github.com/klauspost/compress/zstd"
)

var update = flag.Bool("update", false, "write what nydus-image makes into testdata")

// imageCase is an image of tree, made by nydus-image with some options.
type imageCase struct {
	name   string
	kept   bool   // in testdata
	source string // type of the source: "dir-rafs", "tar-rafs", "targz-ref"
	args   []string
	needs  string             // an option that old versions do not have
	inline bool               // the layer has its bootstrap in it, and a merge makes that of the image
	acl    bool               // with one; version 2.2 cannot
	trees  []func() []tarFile // the layers, if not tree
	dict   bool               // it shares chunks with an older image
}

// layers are the sources, the lowest first.
func (c *imageCase) layers() [][]tarFile {
	if c.trees == nil {
		return [][]tarFile{c.only()}
	}
	var out [][]tarFile
	for _, f := range c.trees {
		out = append(out, f())
	}
	return out
}

func (c *imageCase) only() []tarFile {
	files := tree()
	if c.acl {
		acl := "\x02\x00\x00\x00\x01\x00\x06\x00\xff\xff\xff\xff\x02\x00\x07\x00\xe8\x03\x00\x00\x04\x00\x04\x00\xff\xff\xff\xff\x10\x00\x04\x00\xff\xff\xff\xff\x20\x00\x04\x00\xff\xff\xff\xff"
		files[4].PAXRecords = map[string]string{"SCHILY.xattr.system.posix_acl_access": acl}
	}
	return files
}

// want is what the image must have. Of a tar nydus-image only keeps seconds.
func (c *imageCase) want(t *testing.T) map[string]want {
	layers := c.layers()
	tree := readTree(t, writeTar(t, layers[0]))
	for _, l := range layers[1:] {
		tree = overlay(tree, readTree(t, writeTar(t, l)))
	}
	for path, w := range tree {
		if c.source != "dir-rafs" {
			w.Nsec = 0
		}
		tree[path] = w
	}
	return tree
}

const small = "--chunk-size=0x1000"

var imageCases = []imageCase{
	{name: "v5-zstd-blake3", kept: true, source: "dir-rafs", args: []string{"-v5", small}},
	{name: "v5-lz4-sha256", kept: true, source: "tar-rafs", args: []string{"-v5", small, "--compressor=lz4_block", "--digester=sha256"}},
	{name: "v5-none", source: "dir-rafs", args: []string{"-v5", "--compressor=none", "--aligned-chunk"}},
	{name: "v5-inline", source: "tar-rafs", args: []string{"-v5", small}, inline: true},
	{name: "v6-zstd-blake3", kept: true, source: "dir-rafs", args: []string{"-v6"}},
	{name: "v6-lz4-sha256", kept: true, source: "dir-rafs", args: []string{"-v6", small, "--compressor=lz4_block", "--digester=sha256"}},
	{name: "v6-none", kept: true, source: "tar-rafs", args: []string{"-v6", small, "--compressor=none"}},
	{name: "v6-inline", source: "tar-rafs", args: []string{"-v6", small}, inline: true},
	{name: "v6-inline-toc", kept: true, source: "tar-rafs", args: []string{"-v6", small, "--features=blob-toc"}, inline: true},
	{name: "v6-zran", kept: true, source: "targz-ref", args: []string{"-v6", "--features=blob-toc"}, inline: true, trees: []func() []tarFile{large}},
	{name: "v6-estargz", source: "estargz-ref", args: []string{"-v6", "--features=blob-toc"}, inline: true},
	{name: "v6-merge", kept: true, source: "tar-rafs", args: []string{"-v6", small, "--features=blob-toc"}, inline: true, trees: []func() []tarFile{tree, upper}},
	{name: "v6-dict", source: "tar-rafs", args: []string{"-v6", small}, dict: true},
	{name: "v5-tiny", kept: true, source: "tar-rafs", args: []string{"-v5", small, "--compressor=none"}, trees: []func() []tarFile{tiny}},
	{name: "v6-tiny", kept: true, source: "tar-rafs", args: []string{"-v6", small, "--compressor=none"}, trees: []func() []tarFile{tiny}},
	{name: "v6-batch-zstd", kept: true, source: "dir-rafs", args: []string{"-v6", "--batch-size=0x2000", "--compressor=zstd"}, needs: "--batch-size", acl: true},
	{name: "v6-batch-lz4-toc", kept: true, source: "tar-rafs", args: []string{"-v6", "--chunk-size=0x2000", "--batch-size=0x2000", "--compressor=lz4_block", "--features=blob-toc"}, needs: "--batch-size", inline: true, acl: true},
	{name: "v6-batch-none", source: "dir-rafs", args: []string{"-v6", "--chunk-size=0x2000", "--batch-size=0x2000", "--compressor=none"}, needs: "--batch-size", acl: true},
}

func caseOf(name string) *imageCase {
	if i := slices.IndexFunc(imageCases, func(c imageCase) bool { return c.name == name }); i >= 0 {
		return &imageCases[i]
	}
	return nil
}

// tool is nydus-image.
type tool struct {
	path string
	help string // of its commands
}

// findTool skips the test where there is no nydus-image.
func findTool(t *testing.T) *tool {
	t.Helper()
	path := os.Getenv("TATAMI_NYDUS_IMAGE")
	if path == "" {
		var err error
		if path, err = exec.LookPath("nydus-image"); err != nil {
			t.Skip("no nydus-image in PATH or TATAMI_NYDUS_IMAGE: `cargo install nydus-rs --bin nydus-image` builds one")
		}
	}
	x := &tool{path: path}
	x.help = x.run(t, "", "create", "--help") + x.run(t, "", "merge", "--help")
	return x
}

func (x *tool) run(t *testing.T, stdin string, args ...string) string {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), x.path, args...)
	cmd.Stdin = strings.NewReader(stdin)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	return string(out)
}

// write puts bytes into a file in dir.
func write(t *testing.T, dir, name string, b []byte) string {
	t.Helper()
	path := filepath.Join(dir, name)
	if err := os.WriteFile(path, b, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

func read(t *testing.T, path string) []byte {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// source writes a tree in the form that a type of source asks for.
func source(t *testing.T, dir, kind string, files []tarFile) string {
	t.Helper()
	plain := writeTar(t, files)
	switch kind {
	case "targz-ref":
		return write(t, dir, "source.tar.gz", gzipped(t, plain))
	case "estargz-ref":
		b := must(estargz.Build(io.NewSectionReader(bytes.NewReader(plain), 0, int64(len(plain))), estargz.WithChunkSize(8192)))(t)
		return write(t, dir, "source.tar.gz", must(io.ReadAll(b))(t))
	case "tar-rafs":
		return write(t, dir, "source.tar", plain)
	}
	root := filepath.Join(dir, "source")
	if err := os.Mkdir(root, 0o700); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "tar", "-x", "-p", "--delay-directory-restore", "--same-owner", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-C", root)
	cmd.Stdin = bytes.NewReader(plain)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", cmd, err, out)
	}
	return root
}

// create makes the image of a case in dir, as load reads it.
func (x *tool) create(t *testing.T, c *imageCase, dir string) {
	t.Helper()
	work := t.TempDir()
	boot := filepath.Join(work, "boot")
	args := append([]string{"create", "--log-level=warn", "--whiteout-spec=none", "--type=" + c.source}, c.args...)
	if c.inline {
		x.createInline(t, c, args, boot, dir)
	} else {
		blobs := filepath.Join(work, "blobs")
		if err := os.Mkdir(blobs, 0o700); err != nil {
			t.Fatal(err)
		}
		if c.dict {
			old := filepath.Join(work, "old")
			lower := source(t, t.TempDir(), "tar-rafs", append(tiny(), regular("big", text(2, 30_000))))
			x.run(t, "", "create", "--log-level=warn", "--type=tar-rafs", "-v6", small, "--bootstrap="+old, "--blob-dir="+blobs, lower)
			args = append(args, "--chunk-dict=bootstrap="+old)
		}
		src := source(t, work, c.source, c.layers()[0])
		x.run(t, "/etc\n/many\n", append(args, "--prefetch-policy=fs", "--bootstrap="+boot, "--blob-dir="+blobs, src)...)
		for _, e := range must(os.ReadDir(blobs))(t) {
			write(t, dir, e.Name()[:8]+".blob", read(t, filepath.Join(blobs, e.Name())))
		}
	}
	write(t, dir, "boot.tar.gz", packBoot(t, read(t, boot)))
}

// createInline makes layers that have their bootstraps in them, and that of
// the image.
func (x *tool) createInline(t *testing.T, c *imageCase, args []string, boot, dir string) {
	t.Helper()
	var layers []inlineLayer
	for i, files := range c.layers() {
		work := t.TempDir()
		blob := filepath.Join(work, "layer")
		src := source(t, work, c.source, files)
		x.run(t, "", append(args, "--blob-inline-meta", "--blob="+blob, src)...)
		l := inlineLayer{read(t, blob), read(t, src), strings.HasSuffix(c.source, "-ref")}
		layers = append(layers, l)
		write(t, dir, fmt.Sprintf("%d.blob", i), l.blob)
		if l.ref {
			write(t, dir, fmt.Sprintf("%d.ref", i), l.source)
		}
	}
	x.merge(t, boot, layers)
}

// inlineLayer is a layer that nydus-image made with --blob-inline-meta.
type inlineLayer struct {
	blob   []byte
	source []byte // it was made of
	ref    bool   // it only refers to the source
}

// merge makes the bootstrap of an image of several layers, as nydus-snapshotter
// does (pkg/converter/tool/builder.go).
func (x *tool) merge(t *testing.T, boot string, layers []inlineLayer) {
	t.Helper()
	work := t.TempDir()
	var digests, sizes, tocs, tocSizes, originals, sources []string
	for _, l := range layers {
		parts := tail(t, l.blob)
		digest := sum(l.blob)
		digests, sizes = append(digests, digest), append(sizes, strconv.Itoa(len(l.blob)))
		name := digest
		if l.ref {
			name = sum(l.source)
		}
		originals = append(originals, name)
		sources = append(sources, write(t, work, name, parts["image.boot"]))
		if toc, ok := parts["rafs.blob.toc"]; ok {
			toc = l.blob[len(l.blob)-len(toc)-512:]
			tocs, tocSizes = append(tocs, sum(toc)), append(tocSizes, strconv.Itoa(len(toc)))
		}
	}
	args := []string{"merge", "--log-level=warn", "--bootstrap=" + boot,
		"--blob-digests=" + strings.Join(digests, ","), "--blob-sizes=" + strings.Join(sizes, ",")}
	if tocs != nil {
		args = append(args, "--blob-toc-digests="+strings.Join(tocs, ","), "--blob-toc-sizes="+strings.Join(tocSizes, ","))
	}
	if strings.Contains(x.help, "--original-blob-ids") {
		args = append(args, "--original-blob-ids="+strings.Join(originals, ","))
	}
	x.run(t, "", append(args, sources...)...)
}

func sum(b []byte) string {
	d := sha256.Sum256(b)
	return hex.EncodeToString(d[:])
}

// tail takes the parts of a layer apart that are behind its data, from its end:
// each has a tar header behind it.
func tail(t *testing.T, b []byte) map[string][]byte {
	t.Helper()
	out := map[string][]byte{}
	for out["image.boot"] == nil && len(b) >= 512 && string(b[len(b)-512+257:][:5]) == "ustar" {
		h := b[len(b)-512:]
		b = b[:len(b)-512]
		name, _, _ := bytes.Cut(h[:100], []byte{0})
		size, err := strconv.ParseUint(strings.Trim(string(h[124:136]), " \x00"), 8, 32)
		if err != nil {
			t.Fatal(err)
		}
		out[string(name)] = b[len(b)-int(size):]
		b = b[:len(b)-int(size)]
	}
	boot := out["image.boot"]
	if boot == nil {
		t.Fatal("layer has no bootstrap")
	}
	if bytes.HasPrefix(boot, []byte{0x28, 0xb5, 0x2f, 0xfd}) {
		z := must(zstd.NewReader(nil))(t)
		defer z.Close()
		out["image.boot"] = must(z.DecodeAll(boot, nil))(t)
	}
	return out
}

// must fails the test if there is an error.
func must[T any](v T, err error) func(testing.TB) T {
	return func(t testing.TB) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return v
	}
}

// TestNydusImage lets a real nydus-image make images and compares them with
// their source.
func TestNydusImage(t *testing.T) {
	x := findTool(t)
	for _, c := range imageCases {
		if c.needs != "" && !strings.Contains(x.help, c.needs) || (c.source == "dir-rafs" && os.Getuid() != 0) {
			t.Logf("not made: %s, by this version or without root", c.name)
			continue
		}
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if *update && c.kept {
				dir = filepath.Join("testdata", c.name)
				if err := os.RemoveAll(dir); err != nil {
					t.Fatal(err)
				}
				if err := os.MkdirAll(dir, 0o755); err != nil {
					t.Fatal(err)
				}
			}
			x.create(t, &c, dir)
			l := load(t, dir).check(t, c.want(t))
			if blobs := len(c.layers()); c.dict && len(l.Access.Blobs) != blobs+1 {
				t.Errorf("chunks are in %d blobs, want %d", len(l.Access.Blobs), blobs+1)
			}
		})
	}
}
