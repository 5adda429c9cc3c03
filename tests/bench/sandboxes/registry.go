package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"

	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tools/link"
)

// registry has the image, behind a link.
type registry struct {
	server *registrytest.Server
	link   *link.Link
	tcp    string // the link's address for the node
	image  string // its reference there
	size   int64  // of the image's files, in bytes
	stop   func() error
}

func newRegistry(ctx context.Context, s link.Shape) (*registry, error) {
	r := &registry{server: registrytest.New(registrytest.Options{})}
	r.link = link.New(r.server.Host(), s)
	img, err := r.build()
	if err != nil {
		return nil, err
	}
	r.server.PushImage("app", "v1", img)
	var lc net.ListenConfig
	l, err := lc.Listen(ctx, "tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	r.tcp = l.Addr().String()
	r.image = r.tcp + "/app:v1"
	ctx, cancel := context.WithCancel(ctx)
	served := make(chan error, 1)
	go func() { served <- r.link.Serve(ctx, l) }()
	r.stop = func() error { cancel(); return <-served }
	return r, nil
}

func (r *registry) close() error {
	err := r.stop()
	r.server.Close()
	return err
}

// What the image has beside a shell: files like those of a program and its
// libraries, half of them compressible.
const (
	smallFiles, smallMax = 1000, 16 << 10
	largeFiles, largeMax = 12, 8 << 20
)

// build makes the image, the same each time, with one gzip layer.
func (r *registry) build() (registrytest.Image, error) {
	path, err := exec.LookPath("busybox")
	if err != nil {
		return registrytest.Image{}, fmt.Errorf("the image's shell (install busybox-static): %w", err)
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		return registrytest.Image{}, err
	}
	entries := []registrytest.Entry{registrytest.Dir("bin", 0o755), registrytest.File("bin/busybox", 0o755, string(busybox))}
	for _, a := range []string{"sh", "find", "cat", "echo"} {
		entries = append(entries, registrytest.Symlink("bin/"+a, "busybox"))
	}
	src := rand.NewChaCha8([32]byte{1})
	rnd := rand.New(src)
	add := func(name string, size int) {
		b := make([]byte, size)
		_, _ = src.Read(b[:size/2]) // never fails
		r.size += int64(size)
		entries = append(entries, registrytest.File(name, 0o644, string(b)))
	}
	for i := range smallFiles {
		add(fmt.Sprintf("usr/share/app/%02d/%03d", i%40, i), 1+rnd.IntN(smallMax))
	}
	for i := range largeFiles {
		add(fmt.Sprintf("usr/lib/lib%d.so", i), largeMax/2+rnd.IntN(largeMax/2))
	}
	tar, err1 := registrytest.Tar(entries...)
	layer, err2 := registrytest.Gzip(tar)
	return registrytest.Image{Layers: []registrytest.Layer{layer}}, errors.Join(err1, err2)
}
