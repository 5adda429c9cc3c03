package node

import (
	"context"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// flights runs at most one job for each key; who asks for a key in flight
// shares the job and its result. A job runs under a context of its own: a
// caller that leaves does not disturb the others, and when the last has left
// the job is cancelled and the key is free. It is as urgent as the most urgent of those
// that wait for it.
type flights[K comparable, V any] struct {
	ctx context.Context // immutable after init
	wg  sync.WaitGroup  // running jobs

	mu     sync.Mutex
	closed bool             // protected by mu
	jobs   map[K]*flight[V] // protected by mu
}

// flight is one job under way.
type flight[V any] struct {
	cancel  context.CancelFunc
	work    *sched.Work   // follows that of the callers
	callers int           // protected by flights.mu
	done    chan struct{} // closed when value and err are set
	value   V
	err     error
	bytes   atomic.Int64 // how far the job is; written by the job
}

// init makes the zero value usable; ctx ends every job.
func (f *flights[K, V]) init(ctx context.Context) {
	f.ctx, f.jobs = ctx, map[K]*flight[V]{}
}

// do returns what the job for key returns. fn is called unless such a job is in
// flight already, which shared tells. watch, if it is there, is given the
// counter of the job's bytes before the job is waited for.
func (f *flights[K, V]) do(ctx context.Context, key K, fn func(ctx context.Context, bytes *atomic.Int64) (V, error), watch func(*atomic.Int64)) (value V, shared bool, err error) {
	work := sched.From(ctx)
	job, part, err := f.join(key, work, fn)
	if err != nil {
		return value, false, err
	}
	if shared = part == nil; shared {
		part = job.work.Follow(work)
	}
	defer part()
	if watch != nil {
		watch(&job.bytes)
	}
	select {
	case <-job.done:
		f.leave(key, job)
		return job.value, shared, job.err
	case <-ctx.Done():
		f.leave(key, job)
		return value, shared, context.Cause(ctx)
	}
}

// join returns the job for key. When it is a new one it follows work already, until part
// is called.
func (f *flights[K, V]) join(key K, work *sched.Work, fn func(context.Context, *atomic.Int64) (V, error)) (job *flight[V], part func(), err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.closed {
		return nil, nil, fmt.Errorf("the node is stopping: %w", errdefs.ErrUnavailable)
	}
	if job, ok := f.jobs[key]; ok {
		job.callers++
		return job, nil, nil
	}
	ctx, cancel := context.WithCancel(f.ctx)
	job = &flight[V]{cancel: cancel, work: sched.NewShared(), callers: 1, done: make(chan struct{})}
	part = job.work.Follow(work) // nothing waits with it yet
	ctx = sched.With(ctx, job.work)
	f.jobs[key] = job
	f.wg.Go(func() {
		job.value, job.err = fn(ctx, &job.bytes)
		f.forget(key, job)
		close(job.done)
	})
	return job, part, nil
}

// leave is called once by each caller.
func (f *flights[K, V]) leave(key K, job *flight[V]) {
	f.mu.Lock()
	job.callers--
	last := job.callers == 0
	f.mu.Unlock()
	if last {
		f.forget(key, job)
		job.cancel()
	}
}

// forget frees key for another job, unless another has it already.
func (f *flights[K, V]) forget(key K, job *flight[V]) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.jobs[key] == job {
		delete(f.jobs, key)
	}
}

// close waits for all jobs; no new one starts.
// Precondition: f.ctx has ended.
func (f *flights[K, V]) close() {
	f.mu.Lock()
	f.closed = true
	f.mu.Unlock()
	f.wg.Wait()
}
