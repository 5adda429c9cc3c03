package store

import (
	"os"
	"time"
)

// SetFillPatience changes how long Fill waits for demand reads.
func (s *Store) SetFillPatience(d time.Duration) { s.fillPatience = d }

// Waiting is how many demand reads wait for chunks.
func (s *Store) Waiting() int64 { return s.demand.waiting.Load() }

// Flush makes durable what was kept so far.
func (s *Store) Flush() { s.flushAll() }

// ForgetMemory drops the chunks that wait in memory.
func (s *Store) ForgetMemory() { s.mem.drop() }

// SetSync changes how the data of segments is synced.
func (s *Store) SetSync(f func(*os.File) error) { s.syncFile = f }

// Ahead is how many bytes of readahead are in flight.
func (s *Store) Ahead() int64 { return s.stats.ahead.Load() }

// Scanned waits until the chunks on disk are known.
func (s *Store) Scanned() { <-s.scanned }

// Known is how many chunks are known.
func (s *Store) Known() int {
	s.known.mu.Lock()
	defer s.known.mu.Unlock()
	return len(s.known.places)
}
