package session

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"runtime"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"
)

// SuperviseConfig says which worker to keep running, and how.
type SuperviseConfig struct {
	// Session is taken over: Supervise closes it.
	Session *Session
	// Command is the worker's program and arguments. The worker calls Inherit.
	Command []string
	Env     []string // nil: the environment of this process
	// ExtraFiles reach the worker as Link.Extra: sockets that must outlive it.
	ExtraFiles []*os.File
	Stdout     *os.File // nil: that of this process
	Stderr     *os.File
	// Grace is how long a worker may take to end after SIGTERM; 0 means 20 s.
	Grace time.Duration
	// Restart replaces the worker, for an upgrade: it is killed, unless Polite,
	// and the next one goes on. May be nil.
	Restart <-chan struct{}
	// Polite restarts by SIGTERM and Grace, for workers that answer more than
	// the session: calls under way end as they should.
	Polite bool
	// Cleanup runs when the last worker has ended and before the session is
	// unmounted, under a context of its own. It undoes what the worker left,
	// and must not read anything that lies on the session. May be nil.
	Cleanup func(context.Context) error
	// Keep, if not empty, is a file that describes the session to a later
	// supervisor (Resume), which the session is then left to: when ctx is done,
	// or supervising fails, nothing is cleaned up and nothing unmounted.
	// Somebody must hold the session's Descriptor meanwhile.
	Keep string
	// Restarts, if not nil, counts the workers that were started again.
	Restarts *atomic.Int64
	Log      *slog.Logger // nil: silent
}

// Waits before a worker is started again: none the first time, then firstDelay,
// doubled up to maxDelay; a worker that lived for goodLife starts the row anew.
const (
	firstDelay = 20 * time.Millisecond
	maxDelay   = 5 * time.Second
	goodLife   = 10 * time.Second

	defaultGrace   = 20 * time.Second
	cleanupTimeout = 20 * time.Second
	// endedEvery is how often a running worker's session is checked. The
	// descriptor is not polled for it: the kernel would wake the supervisor
	// at every request.
	endedEvery = 2 * time.Second
)

// Supervise keeps a worker running until ctx is done (then SIGTERM, Cleanup,
// unmount; nil) or the session is over (ErrEnded). It returns other errors
// when the first worker cannot be started, or when ending went wrong.
//
// Workers are killed when the supervisor dies: nobody would hold the session.
func Supervise(ctx context.Context, cfg SuperviseConfig) error {
	if cfg.Session == nil || len(cfg.Command) == 0 {
		return fmt.Errorf("supervise: session and command are needed: %w", errdefs.ErrInvalidArgument)
	}
	s := &supervisor{SuperviseConfig: cfg}
	if s.Log == nil {
		s.Log = slog.New(slog.DiscardHandler)
	}
	if s.Grace == 0 {
		s.Grace = defaultGrace
	}
	// The kernel kills the worker when the *thread* that started it ends, so
	// this one has to stay.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	err := s.keep()
	if err == nil {
		err = s.serve(ctx)
	}
	if s.Keep != "" && !errors.Is(err, ErrEnded) {
		return errors.Join(err, s.leave())
	}
	return errors.Join(err, s.end())
}

type supervisor struct {
	SuperviseConfig
	journal   *journal       // only with Journal
	started   int            // workers of this supervisor so far
	processes sync.WaitGroup // goroutines that wait for a process
}

// serve runs the journal beside the workers; whichever ends first ends both.
func (s *supervisor) serve(ctx context.Context) error {
	if s.Session.mode != Journal {
		return s.runWorkers(ctx)
	}
	j, err := newJournal(s.Session)
	if err != nil {
		return err
	}
	if err := j.recall(s.Session.pending); err != nil {
		return errors.Join(err, j.close())
	}
	s.journal = j
	g, gctx := errgroup.WithContext(ctx)
	inner, stop := context.WithCancel(gctx)
	// A worker that is told to end may still read its own files, so the
	// journal outlives ctx and stops when the workers have.
	passing, stopPassing := context.WithCancel(context.WithoutCancel(ctx))
	g.Go(func() error { defer stop(); return j.run(passing) })
	err = s.runWorkers(inner)
	stopPassing()
	jerr := g.Wait()
	s.Session.pending = j.unanswered()
	if jerr != nil {
		err = jerr
	}
	return errors.Join(err, j.close())
}

// runWorkers starts one worker after the other.
func (s *supervisor) runWorkers(ctx context.Context) error {
	delay := time.Duration(0)
	for {
		begun := time.Now()
		w, err := s.start()
		if err != nil && s.started == 0 {
			return err
		}
		s.started++
		s.Session.workers++
		if err != nil {
			s.Log.Error("worker not started", "err", err)
		} else if stop, err := s.watch(ctx, w); stop {
			return err
		}
		if s.Session.Ended() {
			return ErrEnded
		}
		if time.Since(begun) > goodLife {
			delay = 0
		}
		if !sleep(ctx, delay) {
			return nil
		}
		delay = min(max(2*delay, firstDelay), maxDelay)
		if s.Restarts != nil {
			s.Restarts.Add(1)
		}
	}
}

// watch waits for the worker's end. stop is true when there shall be no other.
func (s *supervisor) watch(ctx context.Context, w *worker) (stop bool, err error) {
	check := time.NewTicker(endedEvery)
	defer check.Stop()
	for {
		select {
		case <-w.gone:
			return s.ended(w)
		case <-s.Restart:
			s.Log.Info("worker is replaced", "pid", w.pid())
			if s.Polite {
				s.terminate(w)
			} else {
				w.signal(syscall.SIGKILL)
				<-w.gone
			}
			return s.ended(w)
		case <-ctx.Done():
			s.terminate(w)
			return true, nil
		case <-check.C:
			if s.Session.Ended() {
				s.Log.Error("session was unmounted or aborted; worker is stopped", "dir", s.Session.dir)
				s.terminate(w)
				return true, ErrEnded
			}
		}
	}
}

// ended tidies up after a worker that died by itself.
func (s *supervisor) ended(w *worker) (stop bool, err error) {
	if s.Session.Ended() {
		s.detach()
		return true, ErrEnded
	}
	s.Log.Warn("worker ended; the session goes on with another", "pid", w.pid(), "state", w.state())
	s.detach()
	if s.journal != nil {
		return false, nil
	}
	select {
	case <-w.reaped:
	default:
		// A thread of it still waits in the kernel. Should another one have
		// taken a request with it, ask once more when all of them are gone.
		s.processes.Go(func() {
			<-w.reaped
			_ = s.Session.resend() // the session may have ended by then
		})
	}
	return false, nil
}

func (s *supervisor) detach() {
	if s.journal != nil {
		s.journal.detach()
	}
}

// terminate ends a worker in order, or else by force.
func (s *supervisor) terminate(w *worker) {
	if s.Session.Ended() {
		s.detach() // the worker learns that there is nothing to wait for
	}
	w.signal(syscall.SIGTERM)
	grace := time.NewTimer(s.Grace)
	defer grace.Stop()
	select {
	case <-w.gone:
	case <-grace.C:
		s.Log.Warn("worker did not end in time and is killed", "pid", w.pid(), "grace", s.Grace)
		w.signal(syscall.SIGKILL)
		<-w.gone
	}
	s.detach()
}

// keep describes the session to a later supervisor, also to one that comes after
// a crash of this one.
func (s *supervisor) keep() error {
	if s.Keep == "" {
		return nil
	}
	return s.Session.keep(s.Keep)
}

// leave ends the supervising and nothing else. A worker that is stuck in the
// kernel until the next one answers is not waited for.
func (s *supervisor) leave() error {
	err := s.keep()
	reaped := make(chan struct{})
	go func() { s.processes.Wait(); close(reaped) }() // ends with the processes
	select {
	case <-reaped:
	case <-time.After(stuckAfter):
	}
	return errors.Join(err, s.Session.leave())
}

// end undoes what the worker left and unmounts the session.
func (s *supervisor) end() error {
	var err error
	if s.Cleanup != nil {
		ctx, cancel := context.WithTimeout(context.Background(), cleanupTimeout)
		err = s.Cleanup(ctx)
		cancel()
	}
	// Aborting the connection frees threads that still wait for an answer.
	err = errors.Join(err, s.Session.Close())
	s.processes.Wait()
	return err
}

// Hangups turns each SIGHUP until ctx is done into a restart for
// SuperviseConfig: an upgrade to the program as it is then, without a failed
// read.
func Hangups(ctx context.Context) <-chan struct{} {
	signals, restart := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(signals, syscall.SIGHUP)
	go func() { // ends with ctx
		defer signal.Stop(signals)
		for {
			select {
			case <-signals:
			case <-ctx.Done():
				return
			}
			select {
			case restart <- struct{}{}:
			case <-ctx.Done():
				return
			}
		}
	}()
	return restart
}

func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return ctx.Err() == nil
	case <-ctx.Done():
		return false
	}
}
