package formats

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"oras.land/oras-go/v2/registry/remote"

	"github.com/tatami-containers/tatami/tests/ocilayout"
)

// registry is a running docker-registry of Debian.
type registry struct{ host string }

const registryConfig = `
version: 0.1
log: {level: error}
storage:
  filesystem: {rootdirectory: %s}
http: {addr: %s}
validation: {manifests: {urls: {allow: [".*"]}}}
`

func startRegistry(t *testing.T) registry {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	reg := registry{l.Addr().String()}
	l.Close() // the port stays free long enough
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yml")
	if err := os.WriteFile(config, fmt.Appendf(nil, registryConfig, filepath.Join(dir, "data"), reg.host), 0o644); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "docker-registry", "serve", config)
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Wait() }) // t.Context has ended it
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
		resp, err := http.Get("http://" + reg.host + "/v2/")
		if err == nil {
			resp.Body.Close()
			return reg
		}
		if time.Now().After(deadline) {
			t.Fatalf("the registry does not answer: %v", err)
		}
	}
}

// push copies the image of a layout as it is.
func (r registry) push(t *testing.T, layout, repo, tag string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := ocilayout.Dir(layout).Push(ctx, r.host+"/"+repo, tag); err != nil {
		t.Fatal(err)
	}
}

// pushBlobs copies blobs that a copy of their image leaves out: foreign layers.
func (r registry) pushBlobs(t *testing.T, from ocilayout.Dir, repo string, blobs []ocispec.Descriptor) {
	t.Helper()
	to, err := remote.NewRepository(r.host + "/" + repo)
	if err != nil {
		t.Fatal(err)
	}
	to.PlainHTTP = true
	for _, b := range blobs {
		f, err := os.Open(from.Path(b.Digest))
		if err == nil {
			err = to.Blobs().Push(t.Context(), b, f)
			f.Close()
		}
		if err != nil {
			t.Fatalf("push %s: %v", b.Digest, err)
		}
	}
}
