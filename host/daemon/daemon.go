// Package daemon puts tatami-host together. Without a snapshotter it is one
// process, package service. With snapshotters it is two:
//
//	supervisor  holds what must outlive a worker: the FUSE session of images that
//	            are mounted on the node, and the listening sockets
//	worker      does everything
//
// Each reads the configuration for itself, from the same arguments. SIGHUP
// replaces the worker by one of the program as it is now. Under systemd with
// FileDescriptorStoreMax= the session also outlives the supervisor, even one that
// is killed; where the session is session.Journal (before Linux 6.9), reads under
// way at the kill of a supervisor never end, as its journal is lost.
package daemon

import (
	"context"
	"log/slog"
	"path/filepath"

	"github.com/tatami-containers/tatami/host/config"
	"github.com/tatami-containers/tatami/host/service"
	"github.com/tatami-containers/tatami/rootfs/mount"
	"github.com/tatami-containers/tatami/rootfs/mount/session"
)

// Run is the program until ctx ends; args are its own, for the worker.
func Run(ctx context.Context, cfg config.Config, args []string, log *slog.Logger) error {
	switch {
	case session.Inherited():
		return runWorker(ctx, cfg, log.With("role", "worker"))
	case len(cfg.Snapshotters) > 0:
		return supervise(ctx, cfg, args, log.With("role", "supervisor"))
	}
	return service.Run(ctx, cfg, service.Beside{Ready: func() { ready(log) }}, log)
}

// Files in the state directory, beside those of packages mount and mounts.
func sessionDir(cfg config.Config) string  { return filepath.Join(cfg.State, "fuse") }
func sessionFile(cfg config.Config) string { return filepath.Join(cfg.State, "fuse.json") }

// oldKernel, if not empty, makes the program do without what the kernel has
// since Linux 6.9 and 6.12, resent FUSE requests and EROFS on files. Tests set it
// (go build -ldflags -X).
var oldKernel string

func sessionMode() session.Mode {
	if oldKernel != "" {
		return session.Journal
	}
	return session.Auto
}

func mountPath() mount.Path {
	if oldKernel != "" {
		return mount.LoopPath
	}
	return mount.FilePath
}
