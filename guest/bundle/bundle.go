// Package bundle completes runtime configurations with what only the mounted
// image tells. It reads files of containers, so it must not run in the
// supervisor: those reads wait for the worker.
package bundle

import (
	"encoding/json"
	"fmt"
	"path/filepath"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/runtime-spec/specs-go"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// Prepare completes the runtime configuration of a container whose root file
// system is mounted at root: the root path, the ids of a user that is given by
// name, and a place in the order of what is killed when memory ends. It reads
// files of the container.
func Prepare(config []byte, root string) ([]byte, error) {
	var spec specs.Spec
	if err := json.Unmarshal(config, &spec); err != nil {
		return nil, fmt.Errorf("decode the runtime configuration: %w: %w", err, errdefs.ErrInvalidArgument)
	}
	if spec.Process == nil || len(spec.Process.Args) == 0 {
		return nil, fmt.Errorf("the runtime configuration has no command: %w", errdefs.ErrInvalidArgument)
	}
	if spec.Process.Terminal {
		return nil, fmt.Errorf("the runtime configuration asks for a terminal, which there is none of: set process.terminal to false: %w", errdefs.ErrInvalidArgument)
	}
	if !filepath.IsAbs(root) {
		return nil, fmt.Errorf("root file system %q: not an absolute path: %w", root, errdefs.ErrInvalidArgument)
	}
	if spec.Root == nil {
		spec.Root = &specs.Root{}
	}
	spec.Root.Path = root
	if spec.Process.OOMScoreAdj == nil {
		spec.Process.OOMScoreAdj = new(int) // else the daemon's own, far behind everything
	}
	if name := spec.Annotations[api.UserAnnotation]; name != "" {
		user, err := lookUpUser(root, name)
		if err != nil {
			return nil, err
		}
		user.Umask, spec.Process.User = spec.Process.User.Umask, user
	}
	return json.Marshal(&spec)
}
