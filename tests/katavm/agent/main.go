// Command agent stands in for kata-agent 4.1.0 in virtual machines that run
// without Kata, which needs KVM. It does what image services meet: it finds and
// mounts the guest extension image as the guest's systemd units do, launches
// what the image's manifest lists, connects to the Confidential Data Hub once,
// and makes and removes containers in the agent's order, by its paths. Each
// part names the upstream file that it follows. Containers are run by crun
// instead of the agent's rustjail.
package main

import (
	"context"
	"fmt"
	"log/slog"
	"os"

	"github.com/tatami-containers/tatami/guest/vminit"
)

func main() {
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil)).With("role", "kata-agent")
	if vminit.IsInit() {
		log.Error("init", "error", initialise(log))
		return
	}
	if err := serve(context.Background(), log); err != nil {
		log.Error("ended", "error", err)
		os.Exit(1)
	}
}

// initialise makes the machine ready and runs this program again as the agent,
// which systemd does in Kata's guest image. The power goes off with the agent.
func initialise(log *slog.Logger) error {
	if err := vminit.Prepare(); err != nil {
		return err
	}
	return vminit.Run(vminit.Config{Hostname: "kata", Command: []string{"/init", "agent"}, Log: log})
}

// serve is start_sandbox of src/agent/src/main.rs: components first, then the
// agent's own service.
func serve(ctx context.Context, log *slog.Logger) error {
	line, err := readCmdline("/proc/cmdline")
	if err != nil {
		return err
	}
	for _, name := range line.extensions() {
		if err := mountExtension(ctx, name, line["kata.extension."+name+".verity_params"]); err != nil {
			return fmt.Errorf("mount extension %s: %w", name, err) // the unit's OnFailure is poweroff.target
		}
	}
	a := &agent{log: log, containers: map[string]*container{}, storages: map[string]bool{}}
	if err := a.launchComponents(line); err != nil {
		return err
	}
	return a.listen(ctx)
}
