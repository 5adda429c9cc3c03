package virtiofsd

import (
	"path/filepath"
	"strings"
)

// sandboxOf finds a sandbox's id in the paths that Kata makes: a shared directory
// is .../sandboxes/<id>/... (runtime-rs, crates/resource/src/share_fs/utils.rs; Go,
// virtcontainers/kata_agent.go), a socket .../<id>/vhost-fs.sock (Go) or
// .../<id>/root/virtiofsd.sock (runtime-rs, whose VMM may be jailed there). Empty
// when there is none.
func sandboxOf(sharedDir, socket string) string {
	if _, behind, ok := strings.Cut(sharedDir, "/sandboxes/"); ok {
		id, _, _ := strings.Cut(behind, "/")
		return id
	}
	if socket == "" {
		return ""
	}
	dir := filepath.Dir(socket)
	if filepath.Base(dir) == "root" {
		dir = filepath.Dir(dir)
	}
	if id := filepath.Base(dir); id != "/" && id != "." {
		return id
	}
	return ""
}
