package service

import (
	"encoding/base64"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/distribution/reference"

	"github.com/tatami-containers/tatami/host/config"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// TestRegistrySettings resolves an image at a mirror of hosts.toml with the
// credentials of a pull secret, as the settings say.
func TestRegistrySettings(t *testing.T) {
	a := &registrytest.Auth{User: "user", Password: "secret", Basic: true}
	origin, mirror := registrytest.Start(t, registrytest.Options{Auth: a}), registrytest.Start(t, registrytest.Options{Auth: a})
	for _, reg := range []*registrytest.Server{origin, mirror} {
		reg.PushImage("library/x", "v1", registrytest.Image{})
	}
	dir := t.TempDir()
	files := map[string]string{
		"certs.d/_default/hosts.toml": fmt.Sprintf("[host.\"http://%s\"]\ncapabilities = [\"pull\", \"resolve\"]\n", mirror.Host()),
		"secrets/.dockerconfigjson":   fmt.Sprintf(`{"auths":{%q:{"auth":%q}}}`, mirror.Host(), base64.StdEncoding.EncodeToString([]byte("user:secret"))),
		"providers.yaml":              "kind: CredentialProviderConfig\napiVersion: kubelet.config.k8s.io/v1\n",
	}
	for name, text := range files {
		path := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	settings := config.Config{Registry: config.Registry{
		ConfigPath:  filepath.Join(dir, "absent") + ":" + filepath.Join(dir, "certs.d"),
		Credentials: filepath.Join(dir, "config.json") + ":" + filepath.Join(dir, "secrets"), Ranges: 2,
	}}
	log := slog.New(slog.DiscardHandler)
	sources, err := openSources(settings.Registry, log)
	if err != nil {
		t.Fatal(err)
	}
	defer sources.Close()
	client := newClient(settings, sources, nil, log)
	defer client.Close()
	name, err := reference.ParseNormalizedNamed(origin.Host() + "/library/x")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Repository(name).Resolve(t.Context(), "v1"); err != nil {
		t.Error(err)
	}
	if len(mirror.Requests("/v2/")) == 0 || len(origin.Requests("/v2/")) != 0 {
		t.Errorf("the mirror was asked %d times, the registry %d times", len(mirror.Requests("/v2/")), len(origin.Requests("/v2/")))
	}
	settings.Registry.Credentials = filepath.Join(dir, "providers.yaml")
	if _, err := openSources(settings.Registry, log); err == nil || !strings.Contains(err.Error(), "0 providers") {
		t.Errorf("a config without providers: %v", err)
	}
}
