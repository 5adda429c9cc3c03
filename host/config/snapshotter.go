package config

import (
	"fmt"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// Snapshotter is one of containerd's proxy snapshotters: one for each way in
// which containers of a runtime class get their images.
type Snapshotter struct {
	// Name is what containerd calls it: lower-case letters, digits, "-", "_".
	Name string `toml:"name"`
	// Socket is where containerd finds it; <state>/<name>.sock when empty.
	Socket string `toml:"socket"`
	// Mode is "guest", "block", "share", "nydus" or "full".
	Mode string `toml:"mode"`
	// Allow lists the modes that a pod may ask for by a label.
	Allow []string `toml:"allow"`
	// Fallback lists the modes to try in order for images that Mode cannot serve.
	Fallback []string `toml:"fallback"`
	// ChainIDs is "claimed" or "verified": what it takes for a layer to be served
	// lazily.
	ChainIDs string `toml:"chain_ids"`
	// UpperSize is the disk for writes in mode block; "0" has none.
	UpperSize Size `toml:"upper_size"`
}

// Size is a number of bytes that is written "10G" in a file; K, M, G and T are
// powers of 1024.
type Size int64

// UnmarshalText reads a size.
func (s *Size) UnmarshalText(text []byte) error {
	digits := strings.TrimRight(string(text), "KMGT")
	shift, known := map[string]uint{"": 0, "K": 10, "M": 20, "G": 30, "T": 40}[string(text[len(digits):])]
	v, err := strconv.ParseInt(digits, 10, 64)
	if !known || err != nil || v < 0 || v > (1<<62)>>shift {
		return fmt.Errorf("%q is no size: write \"10G\"", text)
	}
	*s = Size(v << shift)
	return nil
}

// MarshalText writes a size in bytes.
func (s Size) MarshalText() ([]byte, error) { return strconv.AppendInt(nil, int64(s), 10), nil }

var (
	modes       = []string{"guest", "block", "share", "nydus", "full"}
	snapshotter = regexp.MustCompile(`^[a-z0-9][a-z0-9_-]{0,63}$`)
)

// checkSnapshotters completes the snapshotters and says what is wrong with them.
func (c *Config) checkSnapshotters() error {
	if !filepath.IsAbs(c.State) {
		return fmt.Errorf("state %q: give an absolute path", c.State)
	}
	if h := c.MountHelper; !filepath.IsAbs(h) || !strings.HasPrefix(filepath.Base(h), "nydus-overlayfs") {
		return fmt.Errorf("mount_helper %q: give the absolute path of nydus-overlayfs-tatami (Kata looks for this beginning)", h)
	}
	if len(c.Snapshotters) > 0 && c.IdleExit {
		return fmt.Errorf("idle_exit: containerd needs its snapshotters as long as it runs; set idle_exit = false")
	}
	names, sockets := map[string]bool{}, map[string]bool{c.Socket: true}
	for i := range c.Snapshotters {
		s := &c.Snapshotters[i]
		if err := s.check(c.State); err != nil {
			return fmt.Errorf("snapshotter %q: %w", s.Name, err)
		}
		if names[s.Name] || sockets[s.Socket] {
			return fmt.Errorf("snapshotter %q: another one has its name or socket %s", s.Name, s.Socket)
		}
		names[s.Name], sockets[s.Socket] = true, true
	}
	return nil
}

func (s *Snapshotter) check(state string) error {
	if !snapshotter.MatchString(s.Name) {
		return fmt.Errorf("name: give lower-case letters, digits, \"-\" and \"_\"")
	}
	if s.Socket == "" {
		s.Socket = filepath.Join(state, s.Name+".sock")
	}
	if !filepath.IsAbs(s.Socket) || len(s.Socket) > maxUnixPath {
		return fmt.Errorf("socket %q: give an absolute path of at most %d bytes", s.Socket, maxUnixPath)
	}
	if s.ChainIDs == "" {
		s.ChainIDs = "claimed"
	}
	if s.ChainIDs != "claimed" && s.ChainIDs != "verified" {
		return fmt.Errorf("chain_ids %q: give claimed or verified", s.ChainIDs)
	}
	for _, m := range slices.Concat([]string{s.Mode}, s.Allow, s.Fallback) {
		if !slices.Contains(modes, m) {
			return fmt.Errorf("mode %q: give one of %s", m, strings.Join(modes, ", "))
		}
	}
	return nil
}
