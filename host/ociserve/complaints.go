package ociserve

import (
	"context"
	"log/slog"
	"sync"
	"time"
)

// How often the failures of one object are a warning, and how many objects are
// remembered for it: a client asks as often as it likes.
const (
	complainEvery = time.Minute
	maxComplaints = 256
)

// complaints keeps clients from filling the log.
type complaints struct {
	mu   sync.Mutex
	last map[string]time.Time // when a failure was a warning last, by path; protected by mu
}

// log says what the client is not told.
func (c *complaints) log(log *slog.Logger, what, path string, err error) {
	level := slog.LevelDebug
	if c.due(path, time.Now()) {
		level = slog.LevelWarn
	}
	log.Log(context.Background(), level, what, "path", path, "error", err)
}

func (c *complaints) due(path string, now time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if now.Sub(c.last[path]) < complainEvery {
		return false
	}
	if c.last == nil || len(c.last) >= maxComplaints {
		c.last = map[string]time.Time{}
	}
	c.last[path] = now
	return true
}
