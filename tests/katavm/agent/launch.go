package main

import (
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/containerd/ttrpc"

	"github.com/tatami-containers/tatami/protocols/imageservice/cdh"
	"github.com/tatami-containers/tatami/tests/katavm/extension"
)

// Names of src/agent/src/main.rs, src/agent/src/initdata.rs and src/agent/src/config.rs.
const (
	cocoExtension   = "coco"
	cdhSocket       = "/run/confidential-containers/cdh.sock"
	attestSocket    = "/run/confidential-containers/attestation-agent/attestation-agent.sock"
	initdataDir     = "/run/confidential-containers/initdata"
	launchTimeout   = "6" // DEFAULT_LAUNCH_PROCESS_TIMEOUT in seconds
	restAPIFeatures = "resource"
)

// maxLevels are the values of agent.guest_components_procs
// (guest_components_max_level); the default starts everything.
var maxLevels = map[string]uint32{"none": 0, "attestation-agent": 1, "confidential-data-hub": 2, "api-server-rest": 3}

// launchComponents starts what the extension lists and connects to the
// Confidential Data Hub, if one listens (build_coco_launch_plan,
// init_attestation_components). Without an extension there is the built-in plan,
// of programs that this guest does not have: then nothing is started and the
// socket is not looked at.
func (a *agent) launchComponents(line cmdline) error {
	level := maxLevels["api-server-rest"]
	if v, ok := line["agent.guest_components_procs"]; ok {
		if level, ok = maxLevels[v]; !ok {
			return fmt.Errorf("agent.guest_components_procs=%s", v)
		}
	}
	if err := a.initdata(); err != nil {
		return err
	}
	var err error
	if a.extension, err = extension.Open(filepath.Join(extension.Root, cocoExtension)); err != nil {
		return err
	}
	if a.extension == nil && level > 0 {
		a.log.Warn("attestation binaries requested for launch not available")
		return nil
	}
	plan, err := a.plan(level)
	if err != nil {
		return err
	}
	for _, p := range plan {
		if !exists(p.Path) {
			a.log.Warn("attestation binaries requested for launch not available", "missing", p.Path)
			return nil
		}
	}
	for _, p := range plan {
		if err := a.launch(p); err != nil {
			return fmt.Errorf("launch %s: %w", p.ID, err)
		}
	}
	return a.connectCDH()
}

// plan substitutes the variables that the agent publishes (build_substitution_ctx).
func (a *agent) plan(level uint32) ([]extension.Process, error) {
	if a.extension == nil {
		return nil, nil
	}
	ocicrypt, err := a.extension.Component(extension.OcicryptConfig)
	if err != nil {
		return nil, err
	}
	initdata := filepath.Join(initdataDir, "initdata.toml")
	if !exists(initdata) {
		initdata = ""
	}
	return a.extension.Plan(level, map[string]string{
		"aa_attestation_uri": "unix://" + attestSocket, "aa_attestation_socket": attestSocket,
		"aa_config_path":  filepath.Join(initdataDir, "aa.toml"),
		"cdh_config_path": filepath.Join(initdataDir, "cdh.toml"), "cdh_socket": cdhSocket,
		"ocicrypt_config_path": ocicrypt, "rest_api_features": restAPIFeatures,
		"launch_process_timeout": launchTimeout, "initdata_toml_path": initdata,
		"extension_root": a.extension.Dir, "attester_variant": "default",
	})
}

// launch is launch_process: -c only for a file that exists, a stale socket is
// removed, and the wait begins with a whole second. Nobody looks after the
// process later.
func (a *agent) launch(p extension.Process) error {
	args := p.Args
	if p.Config != "" && exists(p.Config) {
		args = append(args, "-c", p.Config)
	}
	if p.WaitSocket != "" && exists(p.WaitSocket) {
		if err := os.Remove(p.WaitSocket); err != nil {
			return err
		}
	}
	cmd := exec.Command(p.Path, args...) //nolint:noctx // lives as long as the machine
	cmd.Env = append(os.Environ(), p.Env...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Start(); err != nil {
		return err
	}
	go func() { a.log.Warn("component ended", "id", p.ID, "error", cmd.Wait()) }()
	if p.WaitSocket == "" || p.Timeout == 0 {
		return nil
	}
	return waitForPath(p.WaitSocket, p.Timeout)
}

// waitForPath is wait_for_path_to_exist.
func waitForPath(path string, timeout time.Duration) error {
	for waited := time.Duration(0); ; waited += time.Second {
		time.Sleep(time.Second)
		if exists(path) {
			return nil
		}
		if waited >= timeout {
			return fmt.Errorf("wait for %s to exist timeout", path)
		}
	}
}

// connectCDH probes the socket once and makes the one connection of the agent's
// life (src/agent/src/confidential_data_hub/mod.rs, CDH_CLIENT is a OnceCell).
func (a *agent) connectCDH() error {
	st, err := os.Stat(cdhSocket)
	if errors.Is(err, fs.ErrNotExist) || err == nil && st.Mode()&fs.ModeSocket == 0 {
		a.log.Warn("failed to probe CDH socket file", "error", err)
		return nil
	}
	if err != nil {
		return err
	}
	conn, err := net.Dial("unix", cdhSocket) //nolint:noctx // a unix socket answers at once
	if err != nil {
		return fmt.Errorf("create CDH client: %w", err)
	}
	a.cdh = cdh.NewImagePullServiceClient(ttrpc.NewClient(conn))
	return nil
}
