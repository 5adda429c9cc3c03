package node

import (
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/containerd/errdefs"
)

func TestFlightsShare(t *testing.T) {
	var f flights[string, int]
	f.init(t.Context())
	var runs atomic.Int64
	goOn := make(chan struct{})
	job := func(ctx context.Context, bytes *atomic.Int64) (int, error) {
		bytes.Store(7)
		<-goOn
		return int(runs.Add(1)), nil
	}
	const callers = 5
	var wg sync.WaitGroup
	var sharers atomic.Int64
	joined := make(chan struct{}, callers)
	for range callers {
		wg.Go(func() {
			v, shared, err := f.do(t.Context(), "k", job, func(*atomic.Int64) { joined <- struct{}{} })
			if v != 1 || err != nil {
				t.Errorf("got %d, %v", v, err)
			}
			if shared {
				sharers.Add(1)
			}
		})
	}
	for range callers {
		<-joined
	}
	close(goOn)
	wg.Wait()
	if sharers.Load() != callers-1 {
		t.Errorf("%d callers shared", sharers.Load())
	}
	if v, shared, _ := f.do(t.Context(), "k", job, nil); v != 2 || shared {
		t.Errorf("a later call got %d, shared %v", v, shared)
	}
}

// One caller's cancellation does not fail the others; the last one's ends the
// job and frees the key at once.
func TestFlightsCancel(t *testing.T) {
	var f flights[string, int]
	f.init(t.Context())
	ended := make(chan struct{})
	job := func(ctx context.Context, _ *atomic.Int64) (int, error) {
		<-ctx.Done()
		<-ended // a job that takes its time to stop
		return 0, ctx.Err()
	}
	first, cancelFirst := context.WithCancel(t.Context())
	second, cancelSecond := context.WithCancel(t.Context())
	results := make(chan error, 2)
	joined := make(chan struct{}, 2)
	call := func(ctx context.Context) {
		_, _, err := f.do(ctx, "k", job, func(*atomic.Int64) { joined <- struct{}{} })
		results <- err
	}
	go call(first)
	<-joined
	f.mu.Lock()
	running := f.jobs["k"]
	f.mu.Unlock()
	go call(second)
	<-joined
	cancelFirst()
	if err := <-results; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	f.mu.Lock()
	if f.jobs["k"] != running {
		t.Fatal("the job ended with its first caller")
	}
	f.mu.Unlock()
	cancelSecond()
	if err := <-results; !errors.Is(err, context.Canceled) {
		t.Fatal(err)
	}
	v, shared, err := f.do(t.Context(), "k", func(context.Context, *atomic.Int64) (int, error) { return 5, nil }, nil)
	if v != 5 || shared || err != nil {
		t.Fatalf("a call after the cancelled job: %d, %v, %v", v, shared, err)
	}
	close(ended)
	f.close()
}

func TestFlightsClose(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	var f flights[string, int]
	f.init(ctx)
	started := make(chan struct{})
	result := make(chan error, 1)
	go func() {
		_, _, err := f.do(t.Context(), "k", func(ctx context.Context, _ *atomic.Int64) (int, error) {
			close(started)
			<-ctx.Done()
			return 0, ctx.Err()
		}, nil)
		result <- err
	}()
	<-started
	cancel()
	f.close()
	if err := <-result; !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, _, err := f.do(t.Context(), "k", nil, nil); !errdefs.IsUnavailable(err) {
		t.Errorf("a call after close: %v", err)
	}
}
