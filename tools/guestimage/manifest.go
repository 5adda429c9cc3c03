package guestimage

import (
	"bytes"

	"github.com/pelletier/go-toml/v2"
)

// manifest is what kata-agent reads of an extension, schema 1 (kata-containers:
// src/agent/src/guest_extension_image.rs). ${…} are variables of the agent
// (src/agent/src/main.rs, build_substitution_ctx).
type manifest struct {
	SchemaVersion int `toml:"schema_version"`
	// Paths are of components that are no processes, below the extension. The
	// agent refuses to start without "ocicrypt-config".
	Paths   map[string]string `toml:"paths"`
	Process []process         `toml:"process"`
}

// process is started in its turn if its level is not above what
// agent.guest_components_procs allows. The agent goes on when WaitSocket is
// there: it looks once a second, the first time after a second, and only when
// TimeoutSecs is not 0.
type process struct {
	ID          string            `toml:"id"`
	Level       int               `toml:"level"`
	Path        string            `toml:"path"`
	Args        []string          `toml:"args,omitempty"`
	Config      string            `toml:"config,omitempty"` // becomes -c, when the file is there
	Env         map[string]string `toml:"env,omitempty"`
	WaitSocket  string            `toml:"wait_socket,omitempty"`
	TimeoutSecs string            `toml:"timeout_secs,omitempty"`
}

// Levels of agent.guest_components_procs: attestation-agent is the lowest that
// starts something, confidential-data-hub the next.
const (
	levelGuest = 1
	levelCDH   = 2
)

func (o *Options) manifest() string {
	m := manifest{
		SchemaVersion: 1,
		Paths:         map[string]string{"ocicrypt-config": ocicryptPath, "pause-bundle": pauseBundle},
		Process:       []process{o.guestProcess()},
	}
	if o.CDH != "" {
		m.Process = append(m.Process, cdhProcess())
	}
	var b bytes.Buffer
	b.WriteString("# Read by kata-agent, which puts its own values in place of ${…}.\n")
	if err := toml.NewEncoder(&b).Encode(m); err != nil {
		panic(err) // strings and numbers
	}
	return b.String()
}

// guestProcess must be waited for: the agent looks for its socket once, when it
// has started everything.
func (o *Options) guestProcess() process {
	p := process{
		ID: "tatami-guest", Level: levelGuest, Path: guestPath, Config: "${cdh_config_path}",
		Args:       []string{"--cdh-socket", "${cdh_socket}"},
		WaitSocket: "${cdh_socket}", TimeoutSecs: "${launch_process_timeout}",
	}
	if o.Config != "" {
		p.Args = append(p.Args, "--config", "${extension_root}/"+configPath)
	}
	if o.CDH != "" {
		p.Args = append(p.Args, "--cdh-forward", cdhSocket, "--cdh-forward-config", cdhConfig)
	}
	return p
}

// cdhProcess comes after tatami-guest, which writes its configuration before it
// listens. Without that file the hub must not start: it would take the socket
// that the agent connects to.
func cdhProcess() process {
	return process{
		ID: "confidential-data-hub", Level: levelCDH, Path: cdhPath, Args: []string{"-c", cdhConfig},
		// cryptsetup and mkfs are looked up in PATH (guest-components:
		// tools/coco-extension/components.toml).
		Env: map[string]string{
			"OCICRYPT_KEYPROVIDER_CONFIG": "${ocicrypt_config_path}",
			"PATH":                        "${extension_root}/usr/sbin:/bin:/sbin:/usr/bin:/usr/sbin",
		},
		WaitSocket: cdhSocket, TimeoutSecs: "${launch_process_timeout}",
	}
}
