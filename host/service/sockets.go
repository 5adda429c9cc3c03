package service

import (
	"errors"
	"io/fs"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/vsock"
)

// socketPaths are the addresses that are sockets on the file system.
func socketPaths(addresses ...string) []string {
	var out []string
	for _, addr := range addresses {
		a, err := vsock.ParseAddress(addr)
		switch {
		case err != nil:
		case a.Network == vsock.Unix:
			out = append(out, a.Path)
		case a.Network == vsock.Hybrid:
			out = append(out, vsock.HybridListenPath(a.Path, a.Port))
		}
	}
	return out
}

// removeLeftovers removes the sockets that an earlier process noted and nobody
// serves. Those of found sandboxes lie in directories that go with them, and
// are replaced by whoever finds the sandbox again.
func (s *Service) removeLeftovers() {
	for _, n := range s.notes.list() {
		if n.Found {
			continue
		}
		for _, path := range socketPaths(n.Host, n.Relay) {
			if !abandoned(path) {
				continue
			}
			s.log.Info("a socket was left over and is removed", "path", path)
			if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
				s.log.Warn("a left over socket cannot be removed", "path", path, "error", err)
			}
		}
	}
}

// abandoned says whether path is a socket that nobody serves.
func abandoned(path string) bool {
	st, err := os.Lstat(path)
	if err != nil || st.Mode()&os.ModeSocket == 0 {
		return false
	}
	c, err := net.Dial("unix", path) //nolint:noctx // a local socket answers at once
	if err == nil {
		_ = c.Close() // only the answer counted
	}
	return errors.Is(err, unix.ECONNREFUSED)
}
