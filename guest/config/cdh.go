package config

import (
	"bytes"
	"strings"

	"github.com/pelletier/go-toml/v2"
)

// table is where our settings are in the file of a Confidential Data Hub. It
// holds what a file of our own holds.
const table = "tatami"

// parseCDH reads our table of a Confidential Data Hub's file; the rest is not
// ours. A file without the table is no error: not every pod has settings for us.
func (c *Config) parseCDH(name string, b []byte) error {
	all := make(map[string]any)
	if err := toml.Unmarshal(b, &all); err != nil {
		return invalid("%s: %v", name, err)
	}
	if _, ours := all[table]; !ours {
		return nil
	}
	c.Version = 0
	file := struct {
		Tatami *Config `toml:"tatami"`
	}{c}
	err := toml.NewDecoder(bytes.NewReader(b)).DisallowUnknownFields().Decode(&file)
	unknown := unknownKeys(err)
	for _, key := range unknown {
		if strings.HasPrefix(key, table+".") {
			return invalid("%s: unknown key %q: remove it, or use the tatami-guest that knows it", name, key)
		}
	}
	if err != nil && len(unknown) == 0 {
		return invalid("%s: %v", name, err)
	}
	return c.checkVersion(name + ": [" + table + "]")
}

// aaKBCParams is the word of the kernel command line that tells a Confidential
// Data Hub without a file where keys come from: name::URL (guest-components:
// attestation-agent/attestation-agent/src/config/aa_kbc_params.rs).
const aaKBCParams = "agent.aa_kbc_params="

// HubConfig makes the file of a real Confidential Data Hub that listens on
// socket: what the given file has for it, but for our table and the socket. It
// needs a file: by default it takes the socket that the agent connects to, which
// is ours. Without one (b is empty) its settings are those that it would have
// taken without one.
func HubConfig(name string, b []byte, socket, cmdline string) ([]byte, error) {
	all := make(map[string]any)
	if err := toml.Unmarshal(b, &all); err != nil {
		return nil, invalid("%s: %v", name, err)
	}
	delete(all, table)
	all["socket"] = "unix://" + socket
	if _, ok := all["kbc"]; !ok && len(b) == 0 {
		all["kbc"] = defaultKBC(cmdline)
	}
	out, err := toml.Marshal(all)
	if err != nil {
		return nil, invalid("%s: %v", name, err)
	}
	return out, nil
}

func defaultKBC(cmdline string) map[string]any {
	for _, word := range splitCmdline(cmdline) {
		if params, ok := strings.CutPrefix(word, aaKBCParams); ok {
			name, url, _ := strings.Cut(params, "::")
			return map[string]any{"name": name, "url": url}
		}
	}
	return map[string]any{"name": "offline_fs_kbc", "url": ""}
}
