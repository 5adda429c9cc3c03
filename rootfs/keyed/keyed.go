// Package keyed serialises work on things that have names: whoever comes
// second waits, with a context of its own, and then sees what the first did.
package keyed

import (
	"context"
	"sync"
)

// Mutex is a lock for each key. The zero value is ready.
type Mutex struct {
	mu   sync.Mutex
	held map[string]*entry
}

type entry struct {
	token chan struct{} // holds one element while the key is free
	users int           // holder and waiters; protected by Mutex.mu
}

// Lock takes the key and returns what gives it back. When ctx ends first the
// error is its cause.
func (m *Mutex) Lock(ctx context.Context, key string) (unlock func(), err error) {
	e := m.use(key)
	select {
	case <-e.token:
		return func() {
			e.token <- struct{}{}
			m.release(key, e)
		}, nil
	case <-ctx.Done():
		m.release(key, e)
		return nil, context.Cause(ctx)
	}
}

func (m *Mutex) use(key string) *entry {
	m.mu.Lock()
	defer m.mu.Unlock()
	e := m.held[key]
	if e == nil {
		e = &entry{token: make(chan struct{}, 1)}
		e.token <- struct{}{}
		if m.held == nil {
			m.held = make(map[string]*entry)
		}
		m.held[key] = e
	}
	e.users++
	return e
}

func (m *Mutex) release(key string, e *entry) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if e.users--; e.users == 0 {
		delete(m.held, key)
	}
}
