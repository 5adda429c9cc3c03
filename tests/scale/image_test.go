package scale

import (
	"crypto/sha256"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"

	"github.com/tatami-containers/tatami/tests/registrytest"
)

// formats of layers that an image is made in.
var formats = []struct {
	name string
	make func([]byte) (registrytest.Layer, error)
}{
	{"gzip", registrytest.Gzip},
	{"eStargz", func(b []byte) (registrytest.Layer, error) { return registrytest.EStargz(b) }},
}

// application is an image and what its containers do: they read a part of it, and
// print the sum of what they read.
type application struct {
	image  registrytest.Image
	size   int64 // of the layers, in bytes
	prints string
}

// command of a container.
var command = []string{"/bin/sh", "-c", "cat /app/* | sha256sum"}

// newApplication makes an image of a shell, the files that the container reads, and
// twice as much that it does not; half of each file can be compressed. It is the same
// every time.
func newApplication(pack func([]byte) (registrytest.Layer, error), files, size int) (*application, error) {
	shell, err := busybox()
	if err != nil {
		return nil, err
	}
	src, sum := rand.NewChaCha8([32]byte{1}), sha256.New()
	dir := func(name string, files int) []registrytest.Entry {
		entries := []registrytest.Entry{registrytest.Dir(name, 0o755)}
		for i := range files {
			b := make([]byte, size)
			_, _ = src.Read(b[:size/2]) // never fails
			if name == "app" {
				sum.Write(b)
			}
			entries = append(entries, registrytest.File(fmt.Sprintf("%s/%03d", name, i), 0o644, string(b)))
		}
		return entries
	}
	a := &application{}
	for _, entries := range [][]registrytest.Entry{shell, dir("app", files), dir("unused", 2*files)} {
		tar, err := registrytest.Tar(entries...)
		if err != nil {
			return nil, err
		}
		l, err := pack(tar)
		if err != nil {
			return nil, err
		}
		a.image.Layers = append(a.image.Layers, l)
		a.size += int64(len(l.Blob))
	}
	a.prints = fmt.Sprintf("%x  -\n", sum.Sum(nil))
	return a, nil
}

func busybox() ([]registrytest.Entry, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return nil, err
	}
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	entries := []registrytest.Entry{registrytest.Dir("bin", 0o755), registrytest.File("bin/busybox", 0o755, string(b))}
	for _, applet := range []string{"sh", "cat", "sha256sum"} {
		entries = append(entries, registrytest.Symlink("bin/"+applet, "busybox"))
	}
	return entries, nil
}
