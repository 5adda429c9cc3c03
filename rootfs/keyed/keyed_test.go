package keyed

import (
	"context"
	"errors"
	"sync"
	"testing"
)

func TestOneAtATimeForEachKey(t *testing.T) {
	var m Mutex
	var wg sync.WaitGroup
	counts := map[string]*int{"a": new(int), "b": new(int)}
	for key, n := range counts {
		for range 50 {
			wg.Go(func() {
				unlock, err := m.Lock(t.Context(), key)
				if err != nil {
					t.Error(err)
					return
				}
				*n++ // the race detector watches
				unlock()
			})
		}
	}
	wg.Wait()
	if *counts["a"] != 50 || *counts["b"] != 50 || len(m.held) != 0 {
		t.Errorf("counts %d and %d, %d keys left", *counts["a"], *counts["b"], len(m.held))
	}
}

func TestWaitingEndsWithTheContext(t *testing.T) {
	var m Mutex
	unlock, err := m.Lock(t.Context(), "a")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := m.Lock(ctx, "a"); !errors.Is(err, context.Canceled) {
		t.Errorf("second lock: %v", err)
	}
	unlock()
	if len(m.held) != 0 {
		t.Errorf("%d keys left", len(m.held))
	}
}
