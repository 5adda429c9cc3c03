package run

import (
	"context"
	"fmt"
	"io"
	"os"
	"strings"
	"sync"
	"time"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/tools/progress"
)

const progressEvery = 200 * time.Millisecond

// nodeProgress draws one line that tells how far the node is with the image.
type nodeProgress struct {
	w    io.Writer
	tty  bool
	stop context.CancelFunc
	done sync.WaitGroup
}

// showProgress asks the node for its progress until close is called. On
// something that is not a terminal it writes a line when the phase changes.
func showProgress(ctx context.Context, w io.Writer, n api.NodeService, ref string) *nodeProgress {
	ctx, stop := context.WithCancel(ctx)
	p := &nodeProgress{w: w, stop: stop}
	if w == nil {
		return p
	}
	if f, ok := w.(*os.File); ok {
		st, err := f.Stat()
		p.tty = err == nil && st.Mode()&os.ModeCharDevice != 0
	}
	p.done.Go(func() { p.loop(ctx, n, ref) })
	return p
}

func (p *nodeProgress) close() {
	p.stop()
	p.done.Wait()
}

func (p *nodeProgress) loop(ctx context.Context, n api.NodeService, ref string) {
	tick := time.NewTicker(progressEvery)
	defer tick.Stop()
	last, drawn := "", 0
	for {
		select {
		case <-ctx.Done():
			if drawn > 0 {
				fmt.Fprintf(p.w, "\r%s\r", strings.Repeat(" ", drawn))
			}
			return
		case <-tick.C:
		}
		r, err := n.Progress(ctx, &api.ProgressRequest{Reference: ref})
		if err != nil || r.Phase == "" {
			continue
		}
		if p.tty {
			drawn = p.draw(r, drawn)
		} else if r.Phase != last {
			fmt.Fprintf(p.w, "tatami: %s %s\n", ref, r.Phase)
		}
		last = r.Phase
	}
}

// draw overwrites the line of before characters and returns the new length.
func (p *nodeProgress) draw(r *api.ProgressResponse, before int) int {
	line := "tatami: " + r.Phase
	if r.Total > 0 {
		line += fmt.Sprintf(" %3d %%  %s of %s", 100*r.Done/r.Total, progress.Bytes(r.Done), progress.Bytes(r.Total))
	}
	fmt.Fprintf(p.w, "\r%-*s", before, line)
	return len(line)
}
