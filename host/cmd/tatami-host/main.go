// Command tatami-host is the node's daemon: it prepares images once for all
// sandboxes and serves them. See host/config for its settings.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"syscall"

	"github.com/tatami-containers/tatami/host/config"
	"github.com/tatami-containers/tatami/host/daemon"
)

func main() {
	cfg, err := config.Parse(os.Args[1:], os.Stderr)
	if errors.Is(err, flag.ErrHelp) {
		return
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "tatami-host:", err)
		os.Exit(2)
	}
	if cfg.Check {
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM, os.Interrupt)
	defer stop()
	if err := daemon.Run(ctx, cfg, os.Args[1:], cfg.Log.Logger(os.Stderr)); err != nil {
		fmt.Fprintln(os.Stderr, "tatami-host:", err)
		stop()
		os.Exit(1)
	}
}
