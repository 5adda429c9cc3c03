package run

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"

	"github.com/containerd/errdefs"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// Mount mounts an image at a directory of this machine, calls ready, and takes
// everything back when ctx ends or a signal comes.
func Mount(ctx context.Context, opt Options, dir string, ready func(*Report)) error {
	opt.VM = None
	r := &runner{o: opt.withDefaults(), t: newTimeline(), id: newID(), signals: signals{in: opt.Signals}}
	if err := r.o.validate(); err != nil {
		return err
	}
	dir, err := filepath.Abs(dir)
	if err != nil {
		return fmt.Errorf("%s: %w: %w", dir, err, errdefs.ErrInvalidArgument)
	}
	r.o.Target = dir
	r.report = Report{Image: r.o.Image, Mode: r.o.Mode, VM: r.o.VM}
	err = r.hold(ctx, ready)
	return errors.Join(err, r.undo(ctx))
}

// hold mounts and waits. A signal is the ordinary end.
func (r *runner) hold(ctx context.Context, ready func(*Report)) error {
	ctx, quiet := r.signals.watch(ctx)
	defer quiet()
	if err := r.connect(ctx); err != nil {
		return explain(ctx, err)
	}
	if err := r.prepareAndBoot(ctx); err != nil {
		return explain(ctx, err)
	}
	alive, stop := watch(ctx, r.box)
	defer stop()
	if _, err := r.mount(alive); err != nil {
		return explain(alive, err)
	}
	if r.o.Fill {
		if _, err := api.NewGuestClient(r.guest).Prefetch(alive, &api.PrefetchRequest{Id: r.id}); err != nil {
			return explain(alive, err)
		}
	}
	r.report.Phases = r.t.list()
	ready(&r.report)
	<-alive.Done()
	if ctx.Err() == nil { // it was no signal
		return context.Cause(alive)
	}
	return nil
}
