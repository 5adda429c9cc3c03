package cli

import (
	"cmp"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"strings"
	"text/tabwriter"
	"time"
	"unicode"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/protocols/wireerr"
)

// statusTimeout bounds the questions of `tatami status`.
const statusTimeout = 30 * time.Second

// controlSocket is where tatami-host listens unless its settings say otherwise.
const controlSocket = "/var/lib/tatami/tatami-host.sock"

// nodeStatus is what `tatami status -o json` prints.
type nodeStatus struct {
	Snapshotters []*api.SnapshotterStatus `json:"snapshotters"`
	Sandboxes    []*api.SandboxStatus     `json:"sandboxes"`
	Stats        *api.NodeStatsResponse   `json:"stats"`
	Store        *api.StoreStatus         `json:"store"`
	Schedule     *api.ScheduleStatus      `json:"schedule"`
}

func statusCommand(ctx context.Context, args []string, s Streams) (int, error) {
	var socket, output string
	fs := flagSet("status", "[flags]", s.Err)
	fs.StringVar(&socket, "socket", controlSocket, "control socket `PATH` of tatami-host")
	fs.StringVar(&output, "o", "text", "output: text or json")
	if err := parse(fs, args); err != nil {
		return 0, err
	}
	if fs.NArg() > 0 || output != "text" && output != "json" {
		return 0, fmt.Errorf("argument %q, -o %q: see `tatami status -h`: %w", fs.Args(), output, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	st, err := askStatus(ctx, socket)
	if err != nil {
		return 0, err
	}
	if output == "json" {
		e := json.NewEncoder(s.Out)
		e.SetIndent("", "  ")
		return 0, e.Encode(st)
	}
	return 0, st.print(s.Out)
}

func askStatus(ctx context.Context, socket string) (*nodeStatus, error) {
	conn, err := vsock.Dial(ctx, "unix:"+socket)
	if err != nil {
		return nil, fmt.Errorf("reach tatami-host (is it running? --socket names another control socket): %w", err)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	node := api.NewNodeClient(client)
	st, err := node.Status(ctx, &api.StatusRequest{})
	if err != nil {
		return nil, wireerr.FromStatus(err)
	}
	stats, err := node.NodeStats(ctx, &api.NodeStatsRequest{})
	if err != nil {
		return nil, wireerr.FromStatus(err)
	}
	return &nodeStatus{st.Snapshotters, st.Sandboxes, stats, st.Store, st.Schedule}, nil
}

// print writes tables: what serves, what containers have, what else was found.
func (st *nodeStatus) print(out io.Writer) error {
	w := tabwriter.NewWriter(out, 0, 8, 2, ' ', 0)
	fmt.Fprintf(w, "images %d, sandboxes %d, from registries %s, to sandboxes %s\n",
		st.Stats.Images, st.Stats.Sandboxes, mib(st.Stats.RegistryBytes), mib(st.Stats.RelayBytes))
	printStore(w, st.Store)
	printSchedule(w, st.Schedule)
	if len(st.Snapshotters) > 0 {
		fmt.Fprintln(w, "\nSNAPSHOTTER\tMODE\tLAZY LAYERS\tSOCKET")
	}
	for _, s := range st.Snapshotters {
		fmt.Fprintf(w, "%s\t%s\t%d\t%s\n", s.Name, s.Mode, s.LazyLayers, s.Socket)
	}
	st.printSnapshots(w)
	if len(st.Sandboxes) > 0 {
		fmt.Fprintln(w, "\nSANDBOX\tMACHINE\tVIRTIO-FS\tCONTAINER\tIMAGE\tCLASS\tBECAUSE")
	}
	for _, b := range st.Sandboxes {
		fmt.Fprintf(w, "%s\t%s\t%s\t\t\t\t\n", b.Id, b.Identity, cmp.Or(b.VirtioFs, "-"))
		for _, c := range b.Containers {
			fmt.Fprintf(w, "\t\t\t%s\t%s\t%s\t%s\n", c.Id, c.Reference, c.Class, oneLine(c.ClassReason))
		}
	}
	return w.Flush()
}

// printSnapshots lists containers' snapshots, and layers that are not lazy, with
// the reason.
func (st *nodeStatus) printSnapshots(w io.Writer) {
	head := "\nSNAPSHOT\tKIND\tMODE\tIMAGE\tCLASS\tBECAUSE\tREASON\n"
	for _, s := range st.Snapshotters {
		for _, e := range s.Snapshots {
			fmt.Fprint(w, head)
			head = ""
			fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%s\n", e.Key, e.Kind, cmp.Or(e.Mode, "full"), cmp.Or(e.Reference, "-"),
				cmp.Or(e.Class, "-"), cmp.Or(oneLine(e.ClassReason), "-"), oneLine(e.Reason))
		}
		if s.LeftOut > 0 {
			fmt.Fprintf(w, "… and %d more of snapshotter %s\n", s.LeftOut, s.Name)
		}
	}
}

// oneLine is a text of others, as registries are, for one cell of a table on a
// terminal.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsPrint(r) {
			return r
		}
		return ' '
	}, s)
}

func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// printStore writes a line of what images take of the disk, and what is pinned.
func printStore(w io.Writer, s *api.StoreStatus) {
	if s == nil { // a tatami-host that does not say
		return
	}
	bound := "no quota"
	if s.Quota > 0 {
		bound = fmt.Sprintf("of %s (makes way above %s, down to %s)", mib(s.Quota), mib(s.High), mib(s.Low))
	}
	fmt.Fprintf(w, "store %s %s, pinned %s, given up %s, not kept %s\n", mib(s.Used), bound, mib(s.Pinned), mib(s.Evicted), mib(s.Refused))
	for _, ref := range s.Pins {
		fmt.Fprintf(w, "pinned: %s\n", oneLine(ref))
	}
}
