package cli

import (
	"context"
	"encoding/json"
	"fmt"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/tools/checknode"
)

// checkNodeHelp is what the command says of itself after its flags.
const checkNodeHelp = `Reads containerd's and Kata's configuration as they do, asks the sockets, and says
for each handler which mode of Tatami it would use. Writes nothing. The exit code
is 0 when some handler uses Tatami and all that do work, else 1.
`

func checkNodeCommand(ctx context.Context, args []string, s Streams) (int, error) {
	var o checknode.Options
	var output string
	fs := flagSet("check node", "[flags]", s.Err)
	fs.StringVar(&o.Root, "root", "/", "`DIR` with the file system of another node, which is not running")
	fs.StringVar(&o.Containerd, "containerd-config", checknode.ContainerdFile, "containerd's main configuration `FILE`; of k3s /var/lib/rancher/k3s/agent/etc/containerd/config.toml")
	fs.StringVar(&o.Version, "containerd-version", "", "`VERSION` of containerd (default: what `containerd --version` says)")
	fs.StringVar(&o.Host, "host-config", checknode.HostFile, "settings `FILE` of tatami-host")
	fs.StringVar(&output, "o", "text", "output: text or json")
	usage := fs.Usage
	fs.Usage = func() { usage(); fmt.Fprintf(s.Err, "\n%s", checkNodeHelp) }
	if err := parse(fs, args); err != nil {
		return 0, err
	}
	if fs.NArg() > 0 || output != "text" && output != "json" {
		return 0, fmt.Errorf("argument %q, -o %q: see `tatami check node -h`: %w", fs.Args(), output, errdefs.ErrInvalidArgument)
	}
	r, err := checknode.Check(ctx, o)
	if err != nil {
		return 0, err
	}
	if err := printNode(r, output, s); err != nil {
		return 0, err
	}
	if !r.Works {
		return exitProblems, nil
	}
	return 0, nil
}

func printNode(r *checknode.Report, output string, s Streams) error {
	if output == "text" {
		r.WriteText(s.Out)
		return nil
	}
	e := json.NewEncoder(s.Out)
	e.SetIndent("", "  ")
	return e.Encode(r)
}
