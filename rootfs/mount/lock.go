package mount

import (
	"context"
	"sync"
)

// keyLocks are locks with names. Waiting ends with the context. The zero value
// is ready.
type keyLocks struct {
	mu   sync.Mutex
	held map[string]chan struct{} // closed on release
}

func (k *keyLocks) lock(ctx context.Context, key string) (unlock func(), err error) {
	for {
		k.mu.Lock()
		busy, ok := k.held[key]
		if !ok {
			if k.held == nil {
				k.held = make(map[string]chan struct{})
			}
			done := make(chan struct{})
			k.held[key] = done
			k.mu.Unlock()
			return func() { k.release(key, done) }, nil
		}
		k.mu.Unlock()
		select {
		case <-busy:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

func (k *keyLocks) release(key string, done chan struct{}) {
	k.mu.Lock()
	delete(k.held, key)
	k.mu.Unlock()
	close(done)
}
