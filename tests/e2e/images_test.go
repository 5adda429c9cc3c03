package e2e

import (
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// applets of busybox that the tests use.
var applets = []string{"sh", "cat", "echo", "sha256sum", "sleep", "find", "wc", "sort", "xargs", "ls", "id", "kill", "dd", "touch", "df", "head", "true", "stat"}

// busybox is a layer with a static shell and its tools.
func busybox(t *testing.T) []registrytest.Entry {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	entries := []registrytest.Entry{
		registrytest.Dir("bin", 0o755), registrytest.File("bin/busybox", 0o755, string(b)),
		registrytest.Dir("tmp", 0o1777), registrytest.Dir("etc", 0o755),
		registrytest.File("etc/passwd", 0o644, "root:x:0:0::/:/bin/sh\nworker:x:1234:100::/:/bin/sh\n"),
		registrytest.File("etc/group", 0o644, "root:x:0:\nusers:x:100:\nextra:x:555:worker\n"),
	}
	for _, a := range applets {
		entries = append(entries, registrytest.Symlink("bin/"+a, "busybox"))
	}
	return entries
}

func shell() ocispec.ImageConfig { return ocispec.ImageConfig{Cmd: []string{"/bin/sh"}} }

// formats are the layer formats that an image is made in.
var formats = []struct {
	name  string
	index string // what the report calls the index the first time
	make  func([]byte) (registrytest.Layer, error)
}{
	{"gzip", "built", registrytest.Gzip},
	{"tar", "built", func(b []byte) (registrytest.Layer, error) { return registrytest.Uncompressed(b), nil }},
	{"estargz", "toc", func(b []byte) (registrytest.Layer, error) { return registrytest.EStargz(b) }},
}

func layer(t *testing.T, format func([]byte) (registrytest.Layer, error), entries ...registrytest.Entry) registrytest.Layer {
	t.Helper()
	tar, err := registrytest.Tar(entries...)
	if err != nil {
		t.Fatal(err)
	}
	l, err := format(tar)
	if err != nil {
		t.Fatal(err)
	}
	return l
}

// noise is n bytes that no compressor shortens, the same for a seed.
func noise(seed uint64, n int) string {
	src := rand.NewChaCha8([32]byte{byte(seed), byte(seed >> 8), byte(seed >> 16)})
	b := make([]byte, n)
	_, _ = src.Read(b) // never fails
	return string(b)
}

// manyFiles makes n small files in directories of 500.
func manyFiles(n int) []registrytest.Entry {
	var entries []registrytest.Entry
	for i := range n {
		if i%500 == 0 {
			entries = append(entries, registrytest.Dir(fmt.Sprintf("many/%03d", i/500), 0o755))
		}
		entries = append(entries, registrytest.File(fmt.Sprintf("many/%03d/f%d", i/500, i), 0o644, fmt.Sprintf("file %d\n", i)))
	}
	return entries
}
