package e2e

import (
	"strconv"
	"sync"
	"testing"
)

// growing is output that is read while it is written. more has a value after
// each write.
type growing struct {
	more chan struct{}

	mu sync.Mutex
	b  []byte
}

func newGrowing() *growing { return &growing{more: make(chan struct{}, 1)} }

func (g *growing) Write(p []byte) (int, error) {
	g.mu.Lock()
	g.b = append(g.b, p...)
	g.mu.Unlock()
	select {
	case g.more <- struct{}{}:
	default:
	}
	return len(p), nil
}

func (g *growing) String() string {
	g.mu.Lock()
	defer g.mu.Unlock()
	return string(g.b)
}

func atoi(t *testing.T, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}
