package convert_test

import (
	"archive/tar"
	"bytes"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/tests/torture"
	"github.com/tatami-containers/tatami/tools/convert"
)

// tool runs a program of the machine with input.
func tool(t *testing.T, input []byte, name string, args ...string) []byte {
	t.Helper()
	if _, err := exec.LookPath(name); err != nil {
		t.Skip(err)
	}
	cmd := exec.CommandContext(t.Context(), name, args...)
	var stderr bytes.Buffer
	cmd.Stdin, cmd.Stderr = bytes.NewReader(input), &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v: %s", cmd, err, stderr.Bytes())
	}
	return out
}

// unpack decompresses a blob with the system's gzip or zstd.
func unpack(t *testing.T, r result) []byte {
	t.Helper()
	if bytes.HasPrefix(r.blob, []byte{0x1f, 0x8b}) {
		return tool(t, r.blob, "gzip", "-dc")
	}
	return tool(t, r.blob, "zstd", "-dc")
}

// entry is an entry of a tar as its reader sees it.
type entry struct {
	Header *tar.Header
	Data   []byte
}

func entries(plain []byte) map[string]entry {
	m := map[string]entry{}
	walk(plain, func(h *tar.Header, data []byte) { m[h.Name] = entry{h, data} })
	return m
}

// TestOrdinary holds that every format is a plain tar.gz or tar.zst of the
// source's entries, for archive/tar and for GNU tar.
func TestOrdinary(t *testing.T) {
	layers := torture.Layers()
	sources := map[string][]byte{"base": base(), "changes": readable(layers[1]), "again": readable(layers[2]), "empty": make([]byte, 1024)}
	for name, f := range formats {
		for which, source := range sources {
			t.Run(name+" "+which, func(t *testing.T) {
				r := layer(t, source, convert.Options{Format: f, ChunkSize: 300_000})
				plain := unpack(t, r)
				if r.DiffID != digest.FromBytes(plain) || r.PlainSize != int64(len(plain)) {
					t.Errorf("diffID %s of %d bytes, but the blob has %d", r.DiffID, r.PlainSize, len(plain))
				}
				if r.Descriptor.Digest != digest.FromBytes(r.blob) || r.Descriptor.Size != int64(len(r.blob)) {
					t.Error("the descriptor is not that of the blob")
				}
				checkTar(t, f, source, plain)
				tool(t, plain, "tar", "-tf", "-")
			})
		}
	}
}

// checkTar compares a blob's tar with its source.
func checkTar(t *testing.T, f convert.Format, source, plain []byte) {
	t.Helper()
	if f == convert.ZstdChunked {
		if !bytes.Equal(plain, source) {
			t.Error("the tar is not the source's")
		}
		return
	}
	var got, want []entry
	walk(source, func(h *tar.Header, data []byte) { want = append(want, entry{h, data}) })
	walk(plain, func(h *tar.Header, data []byte) {
		switch h.Name {
		case ".no.prefetch.landmark":
			if string(data) != "\x0f" {
				t.Errorf("landmark of %q", data)
			}
		case "stargz.index.json":
		default:
			got = append(got, entry{h, data})
		}
	})
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%d entries are not the source's %d", len(got), len(want))
	}
}

// TestTwice converts what was converted before.
func TestTwice(t *testing.T) {
	once := layer(t, base(), convert.Options{Format: convert.EStargz})
	plain := unpack(t, once)
	again := layer(t, plain, convert.Options{Format: convert.EStargz})
	if !bytes.Equal(again.blob, once.blob) {
		t.Error("a layer that was converted twice is another than one that was converted once")
	}
	if r := layer(t, plain, convert.Options{Format: convert.ZstdChunked}); r.DiffID != once.DiffID {
		t.Error("zstd:chunked has another diffID than the eStargz layer that it was made of")
	}
}

// TestOddTars has tars that end or begin in ways that writers have.
func TestOddTars(t *testing.T) {
	plain := torture.NewTar()
	plain.File("a", "content")
	plain.File("b", "xyz")
	whole := plain.Bytes()
	end := len(whole) - 1024
	var global bytes.Buffer
	w := tar.NewWriter(&global)
	must(w.WriteHeader(&tar.Header{Typeflag: tar.TypeXGlobalHeader, Name: "pax_global_header", PAXRecords: map[string]string{"comment": "0123"}}))
	must(w.Flush())
	cases := map[string][]byte{
		"no end mark":        whole[:end],
		"no padding":         whole[:end-509],
		"one block":          whole[:end+512],
		"padded":             append(bytes.Clone(whole), make([]byte, 5_000_000)...),
		"garbage behind":     append(bytes.Clone(whole), "garbage"...),
		"global header":      append(global.Bytes(), whole...),
		"nothing":            {},
		"same name twice":    concat(whole, whole),
		"garbage in padding": func() []byte { b := bytes.Clone(whole); b[end-1] = 'x'; return b }(),
	}
	for name, source := range cases {
		t.Run(name, func(t *testing.T) {
			for _, f := range formats {
				r := layer(t, source, convert.Options{Format: f})
				checkTar(t, f, source, unpack(t, r))
				_, split := r.Descriptor.Annotations["io.github.containers.zstd-chunked.tarsplit-position"]
				takes := !slices.Contains([]string{"garbage behind", "global header", "same name twice"}, name)
				if f == convert.ZstdChunked && split != takes {
					t.Errorf("tar-split data: %v, want %v", split, takes)
				}
			}
		})
	}
}

// TestUnpack compares trees that GNU tar makes of source and blob.
func TestUnpack(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("owners and devices need root")
	}
	if _, err := exec.LookPath("tar"); err != nil {
		t.Skip(err)
	}
	want := t.TempDir()
	tool(t, base(), "tar", "-C", want, "--delay-directory-restore", "--xattrs", "--xattrs-include=user.*", "-xpf", "-")
	for name, f := range formats {
		got := t.TempDir()
		tool(t, layer(t, base(), convert.Options{Format: f}).blob, "tar", "-C", got, "--delay-directory-restore", "--xattrs", "--xattrs-include=user.*", map[bool]string{true: "-z", false: "--zstd"}[f == convert.EStargz], "-xpf", "-")
		for _, extra := range []string{"stargz.index.json", ".no.prefetch.landmark"} {
			if err := os.Remove(filepath.Join(got, extra)); err != nil && !errors.Is(err, os.ErrNotExist) {
				t.Error(err)
			}
		}
		sameTree(t, name, want, got)
	}
}

// sameTree compares two trees by what GNU tar would archive of them.
func sameTree(t *testing.T, name, want, got string) {
	t.Helper()
	list := func(dir string) []byte {
		return tool(t, nil, "tar", "-C", dir, "--sort=name", "--xattrs", "--format=posix", "--pax-option=delete=atime,delete=ctime", "--exclude=./.prefetch.landmark", "-cf", "-", ".")
	}
	a, b := entries(list(want)), entries(list(got))
	for k, e := range a {
		if e.Header.Name == "./" { // touched by the test
			continue
		}
		if g := b[k]; !reflect.DeepEqual(e, g) {
			t.Errorf("%s: %s is\n%+v, want\n%+v", name, k, g.Header, e.Header)
		}
	}
	if len(a) != len(b) {
		t.Errorf("%s: %d entries, want %d", name, len(b), len(a))
	}
}
