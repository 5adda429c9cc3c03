package service

import (
	"encoding/json"
	"errors"
	"io/fs"
	"net"
	"os"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/vsock"
)

// noteSockets writes down where sandboxes are served on the file system, for
// the next process to clean up after a crash. Precondition: s.mu is held.
func (s *Service) noteSockets() {
	if s.cfg.Sockets == "" {
		return
	}
	paths := []string{}
	for _, box := range s.sandboxes {
		if box != nil {
			paths = append(paths, socketPaths(box.at.host, box.at.relay)...)
		}
	}
	data, err := json.Marshal(paths)
	if err == nil {
		err = os.WriteFile(s.cfg.Sockets, data, 0o600)
	}
	if err != nil {
		s.log.Warn("sockets of sandboxes cannot be noted; after a crash they are left over", "error", err)
	}
}

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
// serves.
func (s *Service) removeLeftovers() {
	data, err := os.ReadFile(s.cfg.Sockets)
	if err != nil {
		return // the first start
	}
	var paths []string
	if err := json.Unmarshal(data, &paths); err != nil {
		s.log.Warn("left over sockets cannot be told", "file", s.cfg.Sockets, "error", err)
	}
	for _, path := range paths {
		if !abandoned(path) {
			continue
		}
		s.log.Info("a socket was left over and is removed", "path", path)
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.log.Warn("a left over socket cannot be removed", "path", path, "error", err)
		}
	}
	if err := os.Remove(s.cfg.Sockets); err != nil {
		s.log.Warn("the note of left over sockets cannot be removed", "error", err)
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
