package sched

import (
	"context"
	"io"
)

// Worker is one goroutine that has a turn while it computes, and none while it waits for
// something else. A nil Worker needs no turns.
type Worker struct {
	slots *Slots
	ctx   context.Context // of all waits
	leave func()          // nil: it has no turn
}

// Worker returns one without a turn; its turns are those of ctx's work.
func (s *Slots) Worker(ctx context.Context) *Worker {
	if s == nil {
		return nil
	}
	return &Worker{slots: s, ctx: ctx}
}

// Begin waits for a turn, if w has none.
func (w *Worker) Begin() error {
	if w == nil || w.leave != nil {
		return nil
	}
	leave, err := w.slots.Enter(w.ctx)
	if err == nil {
		w.leave = leave
	}
	return err
}

// End gives the turn back, if w has one.
func (w *Worker) End() {
	if w == nil || w.leave == nil {
		return
	}
	w.leave()
	w.leave = nil
}

// Wait calls wait without a turn. If w had one, it gets another after that.
func (w *Worker) Wait(wait func() error) error {
	if w == nil || w.leave == nil {
		return wait()
	}
	w.End()
	err := wait()
	if again := w.Begin(); err == nil {
		err = again
	}
	return err
}

// Reader returns r, for which w waits.
func (w *Worker) Reader(r io.Reader) io.Reader {
	if w == nil {
		return r
	}
	return awaitedReader{w, r}
}

type awaitedReader struct {
	worker *Worker
	r      io.Reader
}

// Read implements io.Reader.
func (a awaitedReader) Read(p []byte) (n int, err error) {
	err = a.worker.Wait(func() (err error) {
		n, err = a.r.Read(p)
		return err
	})
	return n, err
}

// Writer returns one for which w waits.
func (w *Worker) Writer(to io.Writer) io.Writer {
	if w == nil {
		return to
	}
	return awaitedWriter{w, to}
}

type awaitedWriter struct {
	worker *Worker
	w      io.Writer
}

// Write implements io.Writer.
func (a awaitedWriter) Write(p []byte) (n int, err error) {
	err = a.worker.Wait(func() (err error) {
		n, err = a.w.Write(p)
		return err
	})
	return n, err
}
