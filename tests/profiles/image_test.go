package profiles

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
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/ocilayout"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// patience bounds each step of a test.
const patience = 2 * time.Minute

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
	var log bytes.Buffer
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
	await(t, "the registry answers", func() bool {
		resp, err := http.Get("http://" + host + "/v2/")
		if err == nil {
			_ = resp.Body.Close()
		}
		return err == nil
	})
	return host
}

func await(t *testing.T, what string, done func() bool) {
	t.Helper()
	for deadline := time.Now().Add(patience); !done(); time.Sleep(20 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("it is not so that %s", what)
		}
	}
}

// An image has so many files of its application, of which a start reads some.
const (
	files = 200
	size  = 120_000 // bytes of each, half of which can be compressed
	reads = 30
)

// command reads files here and there.
func command() []string {
	var names []string
	for i := range reads {
		names = append(names, fmt.Sprintf("/app/%03d", i*73%files))
	}
	return []string{"/bin/sh", "-c", "cat " + strings.Join(names, " ") + " | wc -c"}
}

// pushImage pushes an image of a shell and the application, which can be read lazily.
func pushImage(t *testing.T, registry string) (ref string) {
	t.Helper()
	path, err := exec.LookPath("busybox")
	if err != nil {
		t.Fatal(err)
	}
	shell, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	entries := []registrytest.Entry{registrytest.Dir("bin", 0o755), registrytest.File("bin/busybox", 0o755, string(shell))}
	for _, applet := range []string{"sh", "cat", "wc"} {
		entries = append(entries, registrytest.Symlink("bin/"+applet, "busybox"))
	}
	src := rand.NewChaCha8([32]byte{1})
	entries = append(entries, registrytest.Dir("app", 0o755))
	for i := range files {
		b := make([]byte, size)
		_, _ = src.Read(b[:size/2]) // never fails
		entries = append(entries, registrytest.File(fmt.Sprintf("app/%03d", i), 0o644, string(b)))
	}
	layer := registrytest.Must(registrytest.EStargz(registrytest.Must(registrytest.Tar(entries...))))
	ref = registry + "/app:v1"
	push(t, registry+"/app", layer)
	return ref
}

func push(t *testing.T, repository string, layer registrytest.Layer) {
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
}
