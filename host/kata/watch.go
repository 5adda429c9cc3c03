package kata

import (
	"context"
	"fmt"
	"log/slog"
	"time"
)

// Bounds of a Watcher.
const (
	maxSandboxes = 4096
	maxNames     = 4 * maxSandboxes // read of one directory at a time
	maxAsks      = 16               // shims asked at a time
)

// How long the Watcher pauses between two looks at the directories, and before
// it asks a shim again; the latter doubles up to Config.Rescan.
const (
	settle   = 5 * time.Millisecond
	firstTry = 20 * time.Millisecond
)

// Sandbox is a running one.
type Sandbox struct {
	ID string
	Identity
}

// Handler is told of sandboxes, by one call at a time. Added that fails is
// repeated later. Removed is called once for each Added that did not fail.
type Handler interface {
	Added(Sandbox) error
	Removed(id string)
}

// Config of a Watcher.
type Config struct {
	// RunDirs are the shims' directories. They need not exist.
	RunDirs []string
	// Rescan is how often they are looked at without a reason; 10 s when 0. It
	// is a second at most where directories cannot be watched.
	Rescan time.Duration
	Log    *slog.Logger
}

// blindRescan is how often directories are looked at that cannot be watched.
const blindRescan = time.Second

// Watcher finds sandboxes.
type Watcher struct {
	cfg      Config
	requests chan chan struct{}        // of Rescan
	notify   func() (*notifier, error) // immutable
}

// NewWatcher returns a Watcher that does nothing until Run.
func NewWatcher(cfg Config) *Watcher {
	if cfg.Rescan == 0 {
		cfg.Rescan = 10 * time.Second
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Watcher{cfg: cfg, requests: make(chan chan struct{}), notify: newNotifier}
}

// Rescan looks for sandboxes now and returns when every shim that is there was
// asked, whether it has answered or not, and the handler told. It waits for Run to be called.
func (w *Watcher) Rescan(ctx context.Context) error {
	done := make(chan struct{})
	select {
	case w.requests <- done:
	case <-ctx.Done():
		return fmt.Errorf("look for sandboxes: %w", context.Cause(ctx))
	}
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("look for sandboxes: %w", context.Cause(ctx))
	}
}

// Run tells h of the sandboxes that come and go until ctx ends. It does not
// remove those that are there then. It is called once.
func (w *Watcher) Run(ctx context.Context, h Handler) {
	s := &scanner{
		cfg: w.cfg, log: w.cfg.Log, h: h, results: make(chan result),
		places: map[place]*entry{}, ids: map[string]*entry{}, owners: map[Identity]*entry{},
	}
	n, err := w.notify()
	if err == nil {
		defer n.close()
		s.notifier, s.hints = n, n.hints
	} else {
		s.unwatched(err)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer s.asks.Wait()
	defer cancel()
	s.run(ctx, w.requests)
}
