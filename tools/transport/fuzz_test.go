package transport_test

import (
	"encoding/json"
	"io"
	"os"
	"path/filepath"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/tests/registrytest"
	"github.com/tatami-containers/tatami/tools/transport"
)

// FuzzArchive reads any archive: what opens must give blobs as it describes
// them, or errors.
func FuzzArchive(f *testing.F) {
	f.Add(registrytest.Must(registrytest.Tar(
		registrytest.File("c", 0o644, `{"rootfs":{"diff_ids":["sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"]}}`),
		registrytest.File("l", 0o644, ""), registrytest.Symlink("k", "l"), registrytest.Hardlink("h", "k"),
		registrytest.File("manifest.json", 0o644, `[{"Config":"c","RepoTags":["x:1"],"Layers":["h"]}]`),
	)))
	f.Add(registrytest.Must(registrytest.Tar(
		registrytest.File("oci-layout", 0o644, `{"imageLayoutVersion":"1.0.0"}`),
		registrytest.File("index.json", 0o644, `{"schemaVersion":2,"manifests":[{"mediaType":"application/vnd.oci.image.manifest.v1+json","digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a","size":2}]}`),
		registrytest.File("blobs/sha256/44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a", 0o644, `{}`),
		registrytest.File("manifest.json", 0o644, `[]`),
	)))
	file := filepath.Join(f.TempDir(), "x.tar")
	f.Fuzz(func(t *testing.T, data []byte) {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, kind := range []transport.Kind{transport.DockerArchive, transport.OCIArchive} {
			s, err := transport.OpenSource(transport.Name{Kind: kind, Path: file}, transport.Options{})
			if err != nil {
				continue
			}
			readArchive(t, s)
			if err := s.Close(); err != nil {
				t.Error(err)
			}
		}
	})
}

func readArchive(t *testing.T, s transport.Source) {
	t.Helper()
	desc, data, err := s.GetManifest(t.Context(), "")
	if err != nil {
		return
	}
	if desc.Digest.Algorithm().FromBytes(data) != desc.Digest {
		t.Errorf("manifest of another digest than %s", desc.Digest)
	}
	_, _ = s.Referrers(t.Context(), desc.Digest, "") // an error is a good answer
	var m ocispec.Manifest
	if json.Unmarshal(data, &m) != nil {
		return
	}
	for _, l := range append(m.Layers, m.Config) {
		rc, err := s.Open(t.Context(), l)
		if err != nil {
			continue
		}
		if n, err := io.Copy(io.Discard, rc); err == nil && n != l.Size {
			t.Errorf("%d bytes of %d", n, l.Size)
		}
		_ = rc.Close() // nothing was written
	}
}
