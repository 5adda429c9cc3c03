package cli

import (
	"bytes"
	"cmp"
	"context"
	"fmt"
	"io"
	"os"
	"text/tabwriter"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/protocols/wireerr"
	"github.com/tatami-containers/tatami/rootfs/pathlist"
)

const (
	profileUsage = "ls|export|import|push|rm|ready [flags] [IMAGE [FILE]|CONTAINER]"
	profileHelp  = `What starts of an image read first is its start-up profile; see
tools/deploy/profiles.md.

  ls                    list the profiles of images on this machine
  export IMAGE          print one as a list of paths, one a line
  import IMAGE [FILE]   take such a list, of stdin without FILE, and fetch what it names
  push IMAGE            publish the profile beside the image in its repository
  rm IMAGE              forget it
  ready CONTAINER       say that a container has started: what it reads now is no part
                        of its start

IMAGE is a reference that was pulled, or a manifest digest.
`
)

// profileCall is one word after `tatami profile`.
type profileCall struct {
	min, max int // arguments
	run      func(p *profileTool, ctx context.Context) error
}

var profileCalls = map[string]profileCall{
	"ls":     {0, 0, (*profileTool).list},
	"export": {1, 1, (*profileTool).export},
	"import": {1, 2, (*profileTool).load},
	"push":   {1, 1, (*profileTool).push},
	"rm":     {1, 1, (*profileTool).remove},
	"ready":  {1, 1, (*profileTool).ready},
}

// profileTool is a connection to tatami-host, and what is asked of it.
type profileTool struct {
	Streams
	node       api.NodeService
	args       []string
	entrypoint string
}

func profileCommand(ctx context.Context, args []string, s Streams) (int, error) {
	var socket string
	p := &profileTool{Streams: s}
	fs := flagSet("profile", profileUsage, s.Err)
	fs.StringVar(&socket, "socket", controlSocket, "control socket `PATH` of tatami-host")
	fs.StringVar(&p.entrypoint, "entrypoint", "", "export: the profile of one command, by its `KEY` in ls")
	usage := fs.Usage
	fs.Usage = func() {
		usage()
		fmt.Fprintf(s.Err, "\n%s", profileHelp)
	}
	word, rest := "", args
	if len(args) > 0 && args[0] != "" && args[0][0] != '-' {
		word, rest = args[0], args[1:]
	}
	if err := parse(fs, rest); err != nil {
		return 0, err
	}
	p.args = fs.Args()
	call, ok := profileCalls[word]
	if !ok || len(p.args) < call.min || len(p.args) > call.max {
		return 0, fmt.Errorf("%q with %d arguments: see `tatami profile -h`: %w", word, len(p.args), errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	conn, err := vsock.Dial(ctx, "unix:"+socket)
	if err != nil {
		return 0, fmt.Errorf("reach tatami-host (is it running? --socket names another control socket): %w", err)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	p.node = api.NewNodeClient(client)
	return 0, call.run(p, ctx)
}

func (p *profileTool) list(ctx context.Context) error {
	resp, err := p.node.ListProfiles(ctx, &api.ListProfilesRequest{})
	if err != nil {
		return wireerr.FromStatus(err)
	}
	w := tabwriter.NewWriter(p.Out, 0, 8, 2, ' ', 0)
	fmt.Fprintln(w, "IMAGE\tENTRYPOINT\tCOMMAND\tSTARTS\tRANGES\tSIZE\tFROM")
	for _, r := range resp.Profiles {
		fmt.Fprintf(w, "%s\t%s\t%s\t%d\t%d\t%s\t%s\n", cmp.Or(r.Reference, r.ManifestDigest),
			cmp.Or(r.Entrypoint, "-"), cmp.Or(r.Command, "-"), r.Runs, r.Ranges, mib(r.Bytes), r.Source)
	}
	return w.Flush()
}

func (p *profileTool) export(ctx context.Context) error {
	resp, err := p.node.ExportProfile(ctx, &api.ExportProfileRequest{Image: p.args[0], Entrypoint: p.entrypoint})
	if err != nil {
		return wireerr.FromStatus(err)
	}
	_, err = p.Out.Write(resp.Paths)
	return err
}

func (p *profileTool) load(ctx context.Context) error {
	in := p.In
	if len(p.args) > 1 {
		file, err := os.Open(p.args[1])
		if err != nil {
			return fmt.Errorf("read list of paths: %w", err)
		}
		defer file.Close()
		in = file
	}
	list, err := io.ReadAll(io.LimitReader(in, pathlist.MaxSize+1))
	if err == nil && len(list) > pathlist.MaxSize {
		err = fmt.Errorf("longer than %d bytes: %w", pathlist.MaxSize, errdefs.ErrInvalidArgument)
	}
	if err == nil {
		_, err = pathlist.Read(bytes.NewReader(list))
	}
	if err != nil {
		return fmt.Errorf("read list of paths: %w", err)
	}
	resp, err := p.node.ImportProfile(ctx, &api.ImportProfileRequest{Image: p.args[0], Paths: list})
	if err != nil {
		return wireerr.FromStatus(err)
	}
	fmt.Fprintf(p.Out, "%d files, %s; %d paths are no files of the image\n", resp.Known, mib(resp.Bytes), resp.Unknown)
	return nil
}

func (p *profileTool) push(ctx context.Context) error {
	resp, err := p.node.PushProfile(ctx, &api.PushProfileRequest{Image: p.args[0]})
	if err != nil {
		return wireerr.FromStatus(err)
	}
	fmt.Fprintln(p.Out, resp.Digest)
	return nil
}

func (p *profileTool) remove(ctx context.Context) error {
	_, err := p.node.RemoveProfile(ctx, &api.RemoveProfileRequest{Image: p.args[0]})
	return wireerr.FromStatus(err)
}

func (p *profileTool) ready(ctx context.Context) error {
	_, err := p.node.EndRecording(ctx, &api.EndRecordingRequest{ContainerId: p.args[0]})
	return wireerr.FromStatus(err)
}
