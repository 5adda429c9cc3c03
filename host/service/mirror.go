package service

import (
	"context"
	"log/slog"
	"net"
	"time"

	"github.com/tatami-containers/tatami/host/config"
	"github.com/tatami-containers/tatami/host/mirror"
	"github.com/tatami-containers/tatami/host/node"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// startMirror serves the node's own programs when the settings say so. Where it cannot
// listen, sandboxes are served all the same: containerd asks the next host.
func startMirror(ctx context.Context, cfg config.Config, n *node.Node, turns *sched.Scheduler, log *slog.Logger) (stop func()) {
	if cfg.Mirror.Address == "" {
		return func() {}
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", cfg.Mirror.Address)
	if err != nil {
		log.Error("the mirror cannot listen; containerd asks the registries directly: is its address in use?", "address", cfg.Mirror.Address, "error", err)
		return func() {}
	}
	reach := anonymous(cfg, turns, log)
	reach.Hosts = mirror.WithoutCertificates(reach.Hosts)
	client := registry.New(reach)
	m := mirror.New(mirror.Config{Registry: client, Blobs: n.Blobs(), Stall: time.Duration(cfg.Relay.Stall), Queue: turns.Relay(), Log: log.With("part", "mirror")})
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := m.Serve(l); err != nil {
			log.Error("the mirror ended", "error", err)
		}
	}()
	log.Info("the mirror serves", "address", cfg.Mirror.Address)
	return func() {
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), answerGrace)
		defer cancel()
		m.Shutdown(grace)
		<-ended
		_ = client.Close() // never fails
	}
}
