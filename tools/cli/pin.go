package cli

import (
	"context"
	"fmt"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/protocols/wireerr"
)

const pinHelp = `REF is NAME, NAME:TAG or NAME@DIGEST; "*" stands for any characters but "/", and
without a tag it is all of a repository. Images that are prepared later count, too.
`

func pinCommand(ctx context.Context, args []string, s Streams) (int, error) {
	return 0, eachReference(ctx, "pin", args, s, func(ctx context.Context, node api.NodeService, ref string) error {
		_, err := node.Pin(ctx, &api.PinRequest{Reference: ref})
		return err
	})
}

func unpinCommand(ctx context.Context, args []string, s Streams) (int, error) {
	return 0, eachReference(ctx, "unpin", args, s, func(ctx context.Context, node api.NodeService, ref string) error {
		_, err := node.Unpin(ctx, &api.UnpinRequest{Reference: ref})
		return err
	})
}

// eachReference asks tatami-host something about each of the references that args
// name.
func eachReference(ctx context.Context, name string, args []string, s Streams, ask func(context.Context, api.NodeService, string) error) error {
	var socket string
	fs := flagSet(name, "[flags] REF…", s.Err)
	fs.StringVar(&socket, "socket", controlSocket, "control socket `PATH` of tatami-host")
	usage := fs.Usage
	fs.Usage = func() {
		usage()
		fmt.Fprintf(s.Err, "\n%s", pinHelp)
	}
	if err := parse(fs, args); err != nil {
		return err
	}
	if fs.NArg() == 0 {
		return fmt.Errorf("no reference: see `tatami %s -h`: %w", name, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithTimeout(ctx, statusTimeout)
	defer cancel()
	conn, err := vsock.Dial(ctx, "unix:"+socket)
	if err != nil {
		return fmt.Errorf("reach tatami-host (is it running? --socket names another control socket): %w", err)
	}
	client := ttrpc.NewClient(conn)
	defer client.Close()
	node := api.NewNodeClient(client)
	for _, ref := range fs.Args() {
		if err := ask(ctx, node, ref); err != nil {
			return wireerr.FromStatus(err)
		}
	}
	return nil
}
