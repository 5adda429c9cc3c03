package registry_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestDistributionRegistry reads from a registry that we did not write: the
// CNCF distribution registry of Debian's package docker-registry.
func TestDistributionRegistry(t *testing.T) {
	host := startDistribution(t)
	ctx := t.Context()
	layer := random(3_000_000)
	config := []byte(`{}`)
	layerDesc := upload(t, host, "application/vnd.oci.image.layer.v1.tar", layer)
	manifest := ocispec.Manifest{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest,
		Config: upload(t, host, ocispec.MediaTypeImageConfig, config), Layers: []ocispec.Descriptor{layerDesc},
	}
	desc := uploadManifest(t, host, "v1", manifest.MediaType, manifest)

	name, err := reference.ParseNormalizedNamed(host + "/library/x")
	if err != nil {
		t.Fatal(err)
	}
	client := newClient(t, small())
	repo := client.Repository(name)
	got, err := repo.Resolve(ctx, "v1")
	if err != nil || got.Digest != desc.Digest || got.Size != desc.Size || got.MediaType != desc.MediaType {
		t.Fatalf("resolved %+v, pushed %+v: %v", got, desc, err)
	}
	if _, err := repo.Manifest(ctx, got); err != nil {
		t.Error(err)
	}
	if _, err := repo.Blob(ctx, manifest.Config); err != nil {
		t.Error(err)
	}
	before := client.Stats().Bytes
	rc, err := repo.Range(ctx, layerDesc.Digest, 1_000_001, 65_536)
	data, err := readAll(t, rc, err)
	if err != nil || !bytes.Equal(data, layer[1_000_001:1_000_001+65_536]) {
		t.Errorf("range: %v, %d bytes", err, len(data))
	}
	if n := client.Stats().Bytes - before; n != 65_536 {
		t.Errorf("%d bytes were received for a range of 65536", n)
	}
	rc, err = repo.Open(ctx, layerDesc)
	if data, err = readAll(t, rc, err); err != nil || !bytes.Equal(data, layer) {
		t.Errorf("open: %v, %d bytes", err, len(data))
	}
	if _, err := repo.Range(ctx, layerDesc.Digest, int64(len(layer)), 1); !errdefs.IsOutOfRange(err) {
		t.Errorf("behind the end: %v", err)
	}
	if _, err := repo.Resolve(ctx, "v2"); !errdefs.IsNotFound(err) {
		t.Errorf("unknown tag: %v", err)
	}
	if _, err := repo.Range(ctx, digest.FromString("x"), 0, 1); !errdefs.IsNotFound(err) {
		t.Errorf("unknown blob: %v", err)
	}

	list, err := repo.Referrers(ctx, desc.Digest, wanted)
	if err != nil || len(list) != 0 {
		t.Errorf("no referrers: %v, %d", err, len(list))
	}
	artifact := manifest
	artifact.ArtifactType, artifact.Subject = wanted, &desc
	listed := uploadManifest(t, host, "index", artifact.MediaType, artifact)
	listed.ArtifactType = wanted
	uploadManifest(t, host, "sha256-"+desc.Digest.Encoded(), ocispec.MediaTypeImageIndex, ocispec.Index{
		Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageIndex, Manifests: []ocispec.Descriptor{listed},
	})
	list, err = repo.Referrers(ctx, desc.Digest, wanted)
	if err != nil || len(list) != 1 || list[0].Digest != listed.Digest {
		t.Errorf("referrers: %v, %+v", err, list)
	}
}

// startDistribution runs the registry until the test ends and returns its "host:port".
func startDistribution(t *testing.T) string {
	t.Helper()
	return startDistributionWith(t, "")
}

// startDistributionWith adds lines to its configuration.
func startDistributionWith(t *testing.T, more string) string {
	t.Helper()
	dir := t.TempDir()
	config := filepath.Join(dir, "config.yml")
	host := freePort(t)
	text := fmt.Sprintf("version: 0.1\nlog: {level: error}\nstorage: {filesystem: {rootdirectory: %s}}\nhttp: {addr: %q}\n%s", dir, host, more)
	if err := os.WriteFile(config, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	start(t, host, "docker-registry", "docker-registry", "serve", config)
	return host
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := (&net.ListenConfig{}).Listen(t.Context(), "tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	return l.Addr().String()
}

// upload pushes a blob in one request.
func upload(t *testing.T, host, mediaType string, data []byte) ocispec.Descriptor {
	t.Helper()
	d := digest.FromBytes(data)
	location := request(t, http.MethodPost, "http://"+host+"/v2/library/x/blobs/uploads/", "", nil, http.StatusAccepted)
	q := location.Query()
	q.Set("digest", d.String())
	location.RawQuery = q.Encode()
	request(t, http.MethodPut, location.String(), "application/octet-stream", data, http.StatusCreated)
	return ocispec.Descriptor{MediaType: mediaType, Digest: d, Size: int64(len(data))}
}

func uploadManifest(t *testing.T, host, tag, mediaType string, doc any) ocispec.Descriptor {
	t.Helper()
	data, err := json.Marshal(doc)
	if err != nil {
		t.Fatal(err)
	}
	request(t, http.MethodPut, "http://"+host+"/v2/library/x/manifests/"+tag, mediaType, data, http.StatusCreated)
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data))}
}

// request returns the Location that an upload goes on at, or nil.
func request(t *testing.T, method, address, mediaType string, data []byte, want int) *url.URL {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), method, address, bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", mediaType)
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil || resp.StatusCode != want {
		t.Fatalf("%s %s: %s %s %v", method, address, resp.Status, body, err)
	}
	location, err := resp.Location()
	if err != nil {
		return nil
	}
	return location
}
