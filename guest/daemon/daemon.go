// Package daemon puts tatami-guest together. One program has three roles:
//
//	init        process 1 of a virtual machine of ours: package vminit
//	supervisor  keeps what must outlive a worker: the FUSE session, listening
//	            sockets, the connection of kata-agent, containers
//	worker      serves images and the Guest service
//
// Each role reads the configuration for itself, from the same arguments.
package daemon

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/guest/config"
	"github.com/tatami-containers/tatami/guest/vminit"
	"github.com/tatami-containers/tatami/protocols/vsock"
)

// Roles, as the last argument.
const (
	roleSupervisor = "supervisor"
	roleWorker     = "worker"
	roleCheck      = "check" // reads the configuration and ends
)

// Main runs the role that args (without the program's name) and the process's
// place ask for, and returns its exit code.
func Main(args []string, stderr io.Writer) int {
	err := run(args, stderr)
	switch {
	case err == nil, errors.Is(err, flag.ErrHelp):
		return 0
	default:
		fmt.Fprintln(stderr, "tatami-guest:", err)
		return 1
	}
}

func run(args []string, stderr io.Writer) error {
	if vminit.IsInit() {
		return runInit(stderr)
	}
	cfg, rest, err := config.Load(args, cmdline(), stderr)
	if err != nil {
		return err
	}
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	defer stop()
	switch {
	case len(rest) == 0, len(rest) == 1 && rest[0] == roleSupervisor:
		return runSupervisor(ctx, cfg, args[:len(args)-len(rest)], logger(cfg, stderr, roleSupervisor))
	case len(rest) == 1 && rest[0] == roleWorker:
		return runWorker(ctx, cfg, logger(cfg, stderr, roleWorker))
	case len(rest) == 1 && rest[0] == roleCheck:
		return nil
	}
	return fmt.Errorf("unknown arguments %q: --help lists the flags", rest)
}

// runInit returns only when the machine cannot be switched off.
func runInit(stderr io.Writer) error {
	if err := vminit.Prepare(); err != nil {
		return err
	}
	// The arguments are the words of the kernel's command line that the kernel
	// did not know; they are not meant for us.
	cfg, _, err := config.Load(nil, cmdline(), stderr)
	if err != nil {
		return errors.Join(err, vminit.PowerOff())
	}
	self, err := program()
	if err != nil {
		return errors.Join(err, vminit.PowerOff())
	}
	return vminit.Run(vminit.Config{
		Hostname: cfg.Hostname,
		Net:      vminit.Net(cfg.Net),
		Share:    share(cfg),
		// There is no kata-agent here; what an agent does, Runner does.
		Command: append([]string{self, "--runner", "true", "--cdh-socket", ""}, initListen(cfg)...),
		Log:     logger(cfg, stderr, "init"),
	})
}

// share is where init mounts the node's image files; "" where nobody wants them.
func share(cfg *config.Config) string {
	if cfg.VirtioFS == "off" {
		return ""
	}
	return config.InitShare
}

// initListen makes tatami-guest listen to the node, which has nothing else to
// talk to, unless the configuration says where.
func initListen(cfg *config.Config) []string {
	if !slices.Equal(cfg.Listen, config.Default().Listen) {
		return nil
	}
	return []string{"--listen", vsock.Address{Network: vsock.VSock, Port: vsock.GuestPort}.String()}
}

// cmdline is empty where /proc is not mounted.
func cmdline() string {
	b, _ := os.ReadFile("/proc/cmdline")
	return string(b)
}

// program is the path of this program. os.Executable remembers what it was
// when the process started, which for init is nothing.
func program() (string, error) {
	p, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return "", fmt.Errorf("find this program: %w", err)
	}
	return p, nil
}

func logger(cfg *config.Config, w io.Writer, role string) *slog.Logger {
	level, err := cfg.Level()
	if err != nil {
		level = slog.LevelInfo // Load has checked it
	}
	return slog.New(slog.NewJSONHandler(w, &slog.HandlerOptions{Level: level})).With("role", role)
}

// version of the module, with the revision when it was built from a checkout.
func version() string {
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return "unknown"
	}
	v := info.Main.Version
	for _, s := range info.Settings {
		if s.Key == "vcs.revision" && v == "(devel)" {
			v = s.Value
		}
	}
	return v
}

// Files in the state directory.
func sessionDir(cfg *config.Config) string   { return filepath.Join(cfg.StateDir, "fuse") }
func unpackedDir(cfg *config.Config) string  { return filepath.Join(cfg.StateDir, "unpacked") }
func runnerDir(cfg *config.Config) string    { return filepath.Join(cfg.StateDir, "runner") }
func runnerSocket(cfg *config.Config) string { return filepath.Join(cfg.StateDir, "runner.sock") }
func workerSocket(cfg *config.Config) string { return filepath.Join(cfg.StateDir, "worker.sock") }
