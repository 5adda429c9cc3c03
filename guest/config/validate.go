package config

import (
	"fmt"
	"log/slog"
	"net/netip"
	"path/filepath"
	"slices"
	"time"

	"github.com/tatami-containers/tatami/protocols/vsock"
)

// minStoreMemory is room for two windows of readers at once.
const minStoreMemory = 2 << 20

// maxVirtioFSDir leaves room for an image's name in the 255 bytes of a path that
// fsconfig(2) takes.
const maxVirtioFSDir = 160

func (c *Config) validate() error {
	for _, check := range []func() error{c.checkAddresses, c.checkPaths, c.checkChoices, c.Net.check} {
		if err := check(); err != nil {
			return invalid("%w", err)
		}
	}
	return nil
}

func (c *Config) checkAddresses() error {
	if len(c.Listen) == 0 {
		return fmt.Errorf("listen is empty: name at least one address, such as \"unix:/run/tatami/guest.sock\"")
	}
	named := map[string][]string{
		"listen":        c.Listen,
		"stream_listen": {c.StreamListen},
		"host_address":  {c.HostAddress},
		"relay_address": {c.RelayAddress}, "registry_address": {c.RegistryAddr},
	}
	for key, addresses := range named {
		for _, a := range addresses {
			if a == "" {
				continue
			}
			if _, err := vsock.ParseAddress(a); err != nil {
				return fmt.Errorf("%s: %w", key, err)
			}
		}
	}
	if c.Runner && c.StreamListen == "" {
		return fmt.Errorf("stream_listen is empty: the runner needs it, or set runner = false")
	}
	return nil
}

func (c *Config) checkPaths() error {
	named := map[string]string{
		"state_dir": c.StateDir, "store_dir": c.StoreDir,
		"cdh_socket": c.CDHSocket, "cdh_forward": c.CDHForward, "cdh_forward_config": c.CDHForwardConfig,
	}
	for key, p := range named {
		if p != "" && !filepath.IsAbs(p) {
			return fmt.Errorf("%s is %q: it must be an absolute path", key, p)
		}
	}
	if c.StateDir == "" {
		return fmt.Errorf("state_dir is empty: name a directory that lives as long as the machine, such as /run/tatami")
	}
	for _, path := range c.Credentials {
		if !filepath.IsAbs(path) {
			return fmt.Errorf("credentials has %q: it must be an absolute path", path)
		}
	}
	for _, dir := range c.VirtioFSDirs {
		if !filepath.IsAbs(dir) || len(dir) > maxVirtioFSDir {
			return fmt.Errorf("virtiofs_dirs has %q: it must be an absolute path of at most %d bytes", dir, maxVirtioFSDir)
		}
	}
	return c.checkForward()
}

// checkForward looks for a hub that would take our socket, or call itself.
func (c *Config) checkForward() error {
	switch {
	case c.CDHForward == "" && c.CDHForwardConfig != "":
		return fmt.Errorf("cdh_forward_config is set: name the socket of that Confidential Data Hub as cdh_forward")
	case c.CDHForward != "" && filepath.Clean(c.CDHForward) == filepath.Clean(c.CDHSocket):
		return fmt.Errorf("cdh_forward is %q, the same as cdh_socket: let the Confidential Data Hub listen elsewhere", c.CDHForward)
	}
	return nil
}

func (c *Config) checkChoices() error {
	choices := []struct {
		key, value string
		of         []string
	}{
		{"mount_path", c.MountPath, []string{"auto", "file", "loop"}},
		{"trust", c.Trust, []string{"host", "image"}},
		{"virtiofs", c.VirtioFS, []string{"auto", "off"}},
	}
	for _, ch := range choices {
		if !slices.Contains(ch.of, ch.value) {
			return fmt.Errorf("%s is %q: it must be one of %q", ch.key, ch.value, ch.of)
		}
	}
	if _, err := c.Level(); err != nil {
		return err
	}
	if p := time.Duration(c.Patience); p < 0 || p > time.Hour {
		return fmt.Errorf("patience is %s: it must be 0s to 1h", p)
	}
	if c.StoreMemory < minStoreMemory {
		return fmt.Errorf("store_memory is %d: it must be at least %d bytes", c.StoreMemory, minStoreMemory)
	}
	return nil
}

// Level is the log level.
func (c *Config) Level() (slog.Level, error) {
	var l slog.Level
	if err := l.UnmarshalText([]byte(c.LogLevel)); err != nil {
		return 0, fmt.Errorf("log_level is %q: it must be debug, info, warn or error", c.LogLevel)
	}
	return l, nil
}

func (n *Net) check() error {
	if n.Address != "" {
		if _, err := netip.ParsePrefix(n.Address); err != nil {
			return fmt.Errorf("net.address is %q: write it with the prefix length, such as \"10.0.2.15/24\"", n.Address)
		}
	}
	for _, a := range append([]string{n.Gateway}, n.DNS...) {
		if a == "" {
			continue
		}
		if _, err := netip.ParseAddr(a); err != nil {
			return fmt.Errorf("net.gateway or net.dns has %q, which is no IP address", a)
		}
	}
	return nil
}
