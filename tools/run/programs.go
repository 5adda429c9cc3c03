package run

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"

	"github.com/containerd/errdefs"
)

// FindProgram looks for one of our programs beside this one, then in PATH.
func FindProgram(name string) (string, error) {
	if self, err := os.Executable(); err == nil {
		p := filepath.Join(filepath.Dir(self), name)
		if st, err := os.Stat(p); err == nil && st.Mode().IsRegular() {
			return p, nil
		}
	}
	p, err := exec.LookPath(name)
	if err != nil {
		return "", fmt.Errorf("%s is neither beside tatami nor in PATH; run `make build` or install it: %w", name, errdefs.ErrNotFound)
	}
	return p, nil
}

// FindRuntime looks for an OCI runtime in PATH. It prefers crun, which starts in
// a fraction of runc's time.
func FindRuntime() (string, error) {
	for _, name := range []string{"crun", "runc"} {
		if path, err := exec.LookPath(name); err == nil {
			return filepath.Abs(path)
		}
	}
	return "", fmt.Errorf("neither crun nor runc is in PATH; install one of them: %w", errdefs.ErrNotFound)
}
