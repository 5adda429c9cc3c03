package guestimage

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"

	"github.com/opencontainers/runtime-spec/specs-go"
)

// Places in an extension. Where the agent looks for them, the manifest says.
const (
	guestPath    = "usr/bin/tatami-guest"
	cdhPath      = "usr/local/bin/confidential-data-hub"
	configPath   = "etc/tatami/guest.toml"
	ocicryptPath = "etc/ocicrypt_config.json"
	pauseBundle  = "pause_bundle"
	manifestPath = "etc/kata-extensions/components.toml"
)

// A real Confidential Data Hub listens on a socket of its own and is configured
// by a file that tatami-guest writes: what the pod's initdata has for it, with
// that socket.
const (
	cdhSocket = "/run/confidential-containers/tatami/cdh.sock"
	cdhConfig = "/run/confidential-containers/tatami/cdh.toml"
)

// agentCDHSocket is where kata-agent looks for a Confidential Data Hub
// (kata-containers: src/agent/src/main.rs, CDH_SOCKET).
const agentCDHSocket = "/run/confidential-containers/cdh.sock"

func (o *Options) writeExtension(f *os.File, r *Result) error {
	t, requires, err := o.extension()
	if err != nil {
		return err
	}
	r.Requires = requires
	if !o.Verity {
		_, err := writeEROFS(f, t)
		return err
	}
	var image bytes.Buffer
	if _, err := writeEROFS(&image, t); err != nil {
		return err
	}
	r.VerityParams, err = writeMeasured(f, image.Bytes(), o.Salt)
	return err
}

// extension collects the files, and what the guest must have for them.
func (o *Options) extension() (t tree, requires []string, err error) {
	t, err = o.common()
	if err != nil {
		return nil, nil, err
	}
	if o.CDH != "" {
		hub, needs, err := program(o.CDH, o.Arch)
		if err != nil {
			return nil, nil, err
		}
		t.program(cdhPath, hub)
		requires = needs
	}
	t.text(ocicryptPath, o.ocicrypt())
	t.text(manifestPath, o.manifest())
	return t, requires, nil
}

// common collects what every guest gets.
func (o *Options) common() (tree, error) {
	t := make(tree)
	guest, err := staticProgram(o.Guest, o.Arch)
	if err != nil {
		return nil, err
	}
	t.program(guestPath, guest)
	if err := o.addPause(t); err != nil {
		return nil, err
	}
	return t, o.addConfig(t)
}

func (o *Options) addConfig(t tree) error {
	if o.Config == "" {
		return nil
	}
	b, err := readFile(o.Config)
	if err != nil {
		return err
	}
	t.text(configPath, string(b))
	return nil
}

// addPause adds the bundle that the agent makes a sandbox's own container of:
// it copies config.json and, of rootfs, the file that the first argument names,
// and takes the process from config.json (kata-containers:
// src/agent/src/confidential_data_hub/image.rs).
func (o *Options) addPause(t tree) error {
	pause, err := staticProgram(o.Pause, o.Arch)
	if err != nil {
		return err
	}
	t.program(pauseBundle+"/rootfs/pause", pause)
	config, err := json.MarshalIndent(pauseSpec(), "", "  ")
	if err != nil {
		return fmt.Errorf("configuration of the pause bundle: %w", err)
	}
	t.text(pauseBundle+"/config.json", string(config)+"\n")
	return nil
}

// nobody is whom pause runs as: no user and no group of any image.
const nobody = 65535

func pauseSpec() *specs.Spec {
	return &specs.Spec{
		Version: "1.0.2",
		Root:    &specs.Root{Path: "rootfs"},
		Process: &specs.Process{
			Args:            []string{"/pause"},
			Cwd:             "/",
			Env:             []string{"PATH=/"},
			User:            specs.User{UID: nobody, GID: nobody},
			Capabilities:    &specs.LinuxCapabilities{},
			NoNewPrivileges: true,
		},
	}
}

// ocicrypt says where keys of encrypted images are unwrapped: in a Confidential
// Data Hub (guest-components: confidential-data-hub/hub/src/config/
// ocicrypt_config.rs).
func (o *Options) ocicrypt() string {
	socket := agentCDHSocket
	if o.CDH != "" {
		socket = cdhSocket
	}
	return fmt.Sprintf(`{"key-providers":{"attestation-agent":{"ttrpc":"unix://%s"}}}`+"\n", socket)
}
