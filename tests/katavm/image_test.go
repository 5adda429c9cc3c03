package katavm

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/ocilayout"
	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tests/treecmp"
)

const registryConfig = `
version: 0.1
log: {level: error}
storage:
  filesystem: {rootdirectory: %s}
http: {addr: %s}
`

// startRegistry runs Debian's docker-registry until the test ends.
func startRegistry(t *testing.T) (host string) {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	host = l.Addr().String()
	_ = l.Close() // the port stays free long enough
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(config, fmt.Appendf(nil, registryConfig, filepath.Join(dir, "data"), host), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "docker-registry", "serve", config)
	var log bytes.Buffer // what is not there yet counts as an error
	cmd.Stderr = &log
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_ = cmd.Wait() // t.Context has ended it
		if t.Failed() {
			t.Logf("docker-registry:\n%s", &log)
		}
	})
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		resp, err := http.Get("http://" + host + "/v2/")
		if err == nil {
			_ = resp.Body.Close()
			return host
		}
		if time.Now().After(deadline) {
			t.Fatalf("the registry does not answer: %v", err)
		}
	}
}

// Sizes of the test image's large files in bytes. Nothing compresses them.
const (
	dataSize   = 2 << 20  // read by tests
	unusedSize = 14 << 20 // read by few
)

// testImage is an image in a registry and what is known of it.
type testImage struct {
	ref                     string
	tar                     string // its only layer, as a file
	size                    int64  // of the layer's blob
	manifest, layer, diffID digest.Digest
}

// gzipped and eStargz are formats of a layer: a node fetches all of the first to
// index it, and of the second what is read.
func gzipped(tarball []byte) (registrytest.Layer, error) { return registrytest.Gzip(tarball) }
func eStargz(tarball []byte) (registrytest.Layer, error) { return registrytest.EStargz(tarball) }

// pushImage pushes an image of one layer: a static busybox, the program
// that tells a tree, data of the given seed, and much that nobody reads.
func pushImage(t *testing.T, host, name string, seed uint64, format func([]byte) (registrytest.Layer, error)) testImage {
	t.Helper()
	entries := []registrytest.Entry{
		registrytest.Dir("bin", 0o755), registrytest.Dir("proc", 0o555), registrytest.Dir("sys", 0o555), registrytest.Dir("dev", 0o755),
		registrytest.Dir("tmp", 0o1777), registrytest.Dir("etc", 0o755), registrytest.File("etc/name", 0o640, name+"\n"),
		registrytest.Hardlink("etc/alias", "etc/name"),
		registrytest.File("data", 0o644, noise(seed, dataSize)), registrytest.File("unused", 0o600, noise(seed+1, unusedSize)),
		registrytest.File("bin/busybox", 0o755, readFile(t, "busybox")), registrytest.File("treedump", 0o755, readFile(t, filepath.Join(bin, "treedump"))),
	}
	for _, applet := range []string{"sh", "cat", "sha256sum", "sleep", "echo", "touch", "ls", "id", "rm", "dd", "stat"} {
		entries = append(entries, registrytest.Symlink("bin/"+applet, "busybox"))
	}
	tarball := registrytest.Must(registrytest.Tar(entries...))
	layer := registrytest.Must(format(tarball))
	img := testImage{ref: host + "/" + name + ":v1", tar: filepath.Join(t.TempDir(), "layer.tar"), size: int64(len(layer.Blob)),
		manifest: push(t, host+"/"+name, layer), layer: digest.FromBytes(layer.Blob), diffID: layer.DiffID}
	if err := os.WriteFile(img.tar, tarball, 0o600); err != nil {
		t.Fatal(err)
	}
	return img
}

func push(t *testing.T, repository string, layer registrytest.Layer) digest.Digest {
	t.Helper()
	layout, err := ocilayout.Create(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	desc, err := layout.Put(layer.MediaType, layer.Blob)
	if err != nil {
		t.Fatal(err)
	}
	desc.Annotations = layer.Annotations
	var img ocilayout.Image
	img.Manifest.Layers = []ocispec.Descriptor{desc}
	img.Config.OS, img.Config.Architecture = "linux", runtime.GOARCH
	img.Config.RootFS = ocispec.RootFS{Type: "layers", DiffIDs: []digest.Digest{layer.DiffID}}
	manifest, err := layout.PutImage(img)
	if err == nil {
		err = layout.Seal(manifest)
	}
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := layout.Push(ctx, repository, "v1"); err != nil {
		t.Fatal(err)
	}
	return manifest.Digest
}

// readFile reads a program of this machine, by its path or its name.
func readFile(t *testing.T, program string) string {
	t.Helper()
	path, err := exec.LookPath(program)
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	return string(b)
}

// noise is n bytes that no compressor shortens, the same for a seed.
func noise(seed uint64, n int) string {
	b := make([]byte, n)
	_, _ = rand.NewChaCha8([32]byte{byte(seed)}).Read(b) // never fails
	return string(b)
}

// tree is what GNU tar makes of the image's layer, without skip.
func (i testImage) tree(t *testing.T, skip ...string) treecmp.Tree {
	t.Helper()
	dir := t.TempDir()
	run(t, "tar", "--extract", "--file", i.tar, "--directory", dir, "--numeric-owner", "--same-permissions", "--delay-directory-restore")
	tree, err := treecmp.Snapshot(dir, skip...)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}
