package run

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/protocols/wireerr"
	"github.com/tatami-containers/tatami/tools/bundle"
)

// teardown bounds how long each step of undoing a run may take.
const teardown = 30 * time.Second

// guestReady bounds the time from the machine's start to the daemon's answer.
const guestReady = 90 * time.Second

// runner is one run under way.
type runner struct {
	o      Options
	id     string // of the sandbox and of its container
	t      *timeline
	node   *node
	box    sandbox
	guest  *ttrpc.Client
	report Report

	signals signals

	cleanups []func(context.Context) error
}

// Run runs one container and returns its report, which is complete when the
// error is nil. The exit code of the container is in the report; an error
// means that there is none.
func Run(ctx context.Context, opt Options) (*Report, error) {
	r := &runner{o: opt.withDefaults(), t: newTimeline(), id: newID(), signals: signals{in: opt.Signals}}
	if err := r.o.validate(); err != nil {
		return nil, err
	}
	r.report = Report{Image: r.o.Image, Mode: r.o.Mode, VM: r.o.VM}
	err := r.run(ctx)
	r.report.Done = r.t.since()
	r.report.Phases = r.t.list()
	return &r.report, errors.Join(err, r.undo(ctx))
}

func newID() string {
	var b [6]byte
	_, _ = rand.Read(b[:]) // never fails (crypto/rand, Go 1.24)
	return "run-" + hex.EncodeToString(b[:])
}

// later notes how to undo what was just done.
func (r *runner) later(f func(context.Context) error) { r.cleanups = append(r.cleanups, f) }

// undo takes everything back in reverse, also when ctx has ended.
func (r *runner) undo(ctx context.Context) error {
	var errs []error
	for i := len(r.cleanups) - 1; i >= 0; i-- {
		errs = append(errs, bounded(ctx, r.cleanups[i]))
	}
	return errors.Join(errs...)
}

// bounded gives each cleanup its own time: one that hangs takes none from the
// others.
func bounded(ctx context.Context, f func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), teardown)
	defer cancel()
	return f(ctx)
}

// unlessGone drops the error of a cleanup whose daemon has ended: with it went
// what was to be cleaned up.
func unlessGone(err error) error {
	if errors.Is(err, ttrpc.ErrClosed) {
		return nil
	}
	return err
}

func (r *runner) run(ctx context.Context) error {
	ctx, quiet := r.signals.watch(ctx)
	defer quiet()
	if err := r.connect(ctx); err != nil {
		return explain(ctx, err)
	}
	if err := r.prepareAndBoot(ctx); err != nil {
		return explain(ctx, err)
	}
	ctx, stop := watch(ctx, r.box)
	defer stop()
	img, err := r.mount(ctx)
	if err == nil {
		err = r.runContainer(ctx, img)
	}
	if errors.Is(err, ttrpc.ErrClosed) {
		r.awaitEnd(ctx)
	}
	return explain(ctx, err)
}

// awaitEnd gives a sandbox whose connection broke a moment to be seen as ended.
func (r *runner) awaitEnd(ctx context.Context) {
	t := time.NewTimer(2 * time.Second)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}

// explain prefers the reason why ctx ended (the sandbox died) to what that
// did to the call that was under way.
func explain(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, context.Canceled) {
		return cause
	}
	return err
}

// nodeError says what was asked of the node, and what to look at when it is the
// node that has gone.
func (r *runner) nodeError(doing string, err error) error {
	if errors.Is(err, ttrpc.ErrClosed) {
		return fmt.Errorf("%s: tatami-host has ended; its log may tell why (%s): %w", doing, hostLog(r.o.Root), errdefs.ErrUnavailable)
	}
	return fmt.Errorf("%s: %w", doing, err)
}

// connect opens the way to the node.
func (r *runner) connect(ctx context.Context) error {
	n, err := connectHost(ctx, &r.o)
	if err != nil {
		return err
	}
	r.node = n
	r.later(func(context.Context) error { return n.Close() })
	r.box, err = newSandbox(&r.o, r.id)
	if err != nil {
		return err
	}
	r.later(r.box.close)
	return nil
}

// prepareAndBoot has the node prepare the image while the sandbox boots.
func (r *runner) prepareAndBoot(ctx context.Context) error {
	g, gctx := errgroup.WithContext(ctx)
	g.Go(func() error { return r.boot(gctx) })
	if !r.o.pulls() {
		g.Go(func() error { return r.prepare(gctx) })
	}
	if err := g.Wait(); err != nil || r.o.pulls() {
		return err
	}
	_, err := r.node.AddContainer(ctx, &api.AddContainerRequest{
		Sandbox: r.id, ContainerId: r.id, Reference: r.o.Image, Platform: r.o.Platform, Class: r.o.Class, Args: r.o.Args})
	if err != nil {
		return r.nodeError("tell the node of the container", err)
	}
	return nil
}

func (r *runner) prepare(ctx context.Context) error {
	p := showProgress(ctx, r.o.Progress, r.node, r.o.Image)
	defer p.close()
	from := r.t.since()
	resp, err := r.node.Prepare(ctx, &api.PrepareRequest{Reference: r.o.Image, Platform: r.o.Platform, Class: r.o.Class})
	if err != nil {
		return r.nodeError("prepare "+r.o.Image, err)
	}
	r.t.remote(from, resp.Phases)
	r.report.Digest, r.report.Index = resp.ManifestDigest, resp.Index
	r.report.CompressedSize, r.report.ImageSize = resp.CompressedSize, resp.ImageSize
	return nil
}

// boot starts the sandbox, lets the node listen for it and waits until its
// daemon answers.
func (r *runner) boot(ctx context.Context) error {
	end := r.t.step("VM ready")
	if err := r.box.start(ctx); err != nil {
		return err
	}
	r.report.Accel = r.box.kind()
	ctx, stop := watch(ctx, r.box)
	defer stop()
	if err := r.attach(ctx, r.box.addresses()); err != nil {
		return explain(ctx, err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, guestReady,
		fmt.Errorf("tatami-guest does not answer %v after its start: %w", guestReady, errdefs.ErrUnavailable))
	defer cancel()
	client, err := waitGuest(ctx, r.box.addresses().guest)
	if err != nil {
		return err
	}
	r.guest = client
	r.later(func(context.Context) error { return unlessGone(client.Close()) })
	end()
	return nil
}

// attach lets the node listen for the sandbox, and the registry for a guest that
// asks it.
func (r *runner) attach(ctx context.Context, a addresses) error {
	r.later(func(ctx context.Context) error { // also when the call below was given up half-way
		_, err := r.node.Detach(ctx, &api.DetachRequest{Sandbox: r.id})
		if errdefs.IsNotFound(err) {
			return nil
		}
		return unlessGone(err)
	})
	_, err := r.node.Attach(ctx, &api.AttachRequest{Sandbox: r.id, HostAddress: a.host, RelayAddress: a.relay, Cid: a.cid})
	if err != nil {
		return r.nodeError("attach the sandbox to the node", err)
	}
	if !r.o.pulls() {
		return nil
	}
	l, err := vsock.Listen(a.registry)
	if err != nil {
		return fmt.Errorf("listen for a guest that pulls: %w", err)
	}
	serveCtx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	served := make(chan error, 1)
	go func() { served <- r.o.Registry(serveCtx, l) }()
	r.later(func(context.Context) error { cancel(); return <-served })
	return nil
}

// waitGuest asks for the daemon's health until it answers.
func waitGuest(ctx context.Context, addr string) (*ttrpc.Client, error) {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if conn, err := vsock.Dial(ctx, addr); err == nil {
			client := ttrpc.NewClient(conn, ttrpc.WithUnaryClientInterceptor(wireerr.Client))
			if _, err := api.NewGuestClient(client).Health(ctx, &api.HealthRequest{}); err == nil {
				return client, nil
			}
			client.Close()
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, context.Cause(ctx)
		}
	}
}

func (r *runner) mount(ctx context.Context) (*api.MountResponse, error) {
	from := r.t.since()
	g := api.NewGuestClient(r.guest)
	mode := api.Mode_MODE_LAZY
	if r.o.Mode == Full {
		mode = api.Mode_MODE_FULL
	}
	resp, err := g.Mount(ctx, &api.MountRequest{Id: r.id, Reference: r.o.Image, Target: r.box.target(), Upper: r.o.Upper, Mode: mode})
	if err != nil {
		return nil, fmt.Errorf("mount %s in the guest: %w", r.o.Image, err)
	}
	if r.o.VM == None { // a virtual machine takes its mounts with it
		r.later(func(ctx context.Context) error {
			_, err := g.Unmount(ctx, &api.UnmountRequest{Id: r.id})
			return unlessGone(err)
		})
	}
	r.report.Mounted = r.t.since()
	r.t.add(Phase{"mount", from, r.report.Mounted - from})
	r.report.FetchedAtMount = r.fetched(ctx)
	r.t.remote(from, indented(resp.Phases))
	r.report.MountPath, r.report.Source, r.report.Digest = resp.Path, resp.Source, resp.ManifestDigest
	return resp, nil
}

// indented marks the steps of the guest as parts of the mount.
func indented(phases []*api.Phase) []*api.Phase {
	for _, p := range phases {
		p.Name = "  " + p.Name
	}
	return phases
}

func (r *runner) runContainer(ctx context.Context, img *api.MountResponse) error {
	var config ocispec.Image
	if err := json.Unmarshal(img.Config, &config); err != nil {
		return fmt.Errorf("decode the configuration of %s: %w", r.o.Image, err)
	}
	spec, err := bundle.Spec(config.Config, r.o.Args, r.id)
	if err != nil {
		return fmt.Errorf("%s: %w", r.o.Image, err)
	}
	end := r.t.step("create and start")
	c, err := createContainer(ctx, api.NewRunnerClient(r.guest), r.box.addresses().streams, r.id, spec, &r.o)
	if err != nil {
		return err
	}
	r.later(func(ctx context.Context) error { return unlessGone(c.delete(ctx)) })
	r.report.ExitCode, err = c.run(ctx, func(ctx context.Context) {
		end()
		r.signals.target.Store(c)
		r.report.FirstExec = r.t.since()
		r.report.FetchedAtExec = r.fetched(ctx)
	})
	r.count(ctx)
	return err
}

// fetched is what the node got from registries since the run began; with
// several runs at a time on one node it is their sum.
func (r *runner) fetched(ctx context.Context) int64 {
	s, err := r.node.NodeStats(ctx, &api.NodeStatsRequest{})
	if err != nil {
		r.o.Log.Warn("ask the node for its counters", "error", err)
		return 0
	}
	return s.RegistryBytes - r.node.base.RegistryBytes
}

func (r *runner) count(ctx context.Context) {
	r.report.Fetched = r.fetched(ctx)
	s, err := api.NewGuestClient(r.guest).Stats(ctx, &api.StatsRequest{})
	if err != nil {
		r.o.Log.Warn("ask the guest for its counters", "error", err)
		return
	}
	r.report.Guest = guestReport(s)
}
