package shim

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"strings"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// call makes one call to the agent; out may be nil.
func (s *Sandbox) call(ctx context.Context, path string, in, out any) error {
	body, err := json.Marshal(in)
	if err != nil {
		return err
	}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://agent"+path, bytes.NewReader(body))
	if err != nil {
		return err
	}
	resp, err := s.client.Do(req)
	if err != nil {
		return fmt.Errorf("agent: %s: %w", path, err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(resp.Body) // what came of it is the message
		return fmt.Errorf("agent: %s: %s", path, strings.TrimSpace(string(b)))
	}
	if out == nil {
		return nil
	}
	return json.NewDecoder(resp.Body).Decode(out)
}

// bundle is the directory of a container on the node (containerd:
// core/runtime/v2/bundle.go).
func (s *Sandbox) bundle(id string) string {
	return filepath.Join(s.cfg.ContainerdState, "io.containerd.runtime.v2.task", "k8s.io", id)
}

func (s *Sandbox) writeBundle(id string, spec *specs.Spec) error {
	b, err := json.Marshal(spec)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(s.bundle(id), 0o711); err != nil {
		return err
	}
	return os.WriteFile(filepath.Join(s.bundle(id), "config.json"), b, 0o600)
}
