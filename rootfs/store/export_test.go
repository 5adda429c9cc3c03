package store

import "time"

// SetFillPatience changes how long Fill waits for demand reads.
func (s *Store) SetFillPatience(d time.Duration) { s.fillPatience = d }

// Waiting is how many demand reads wait for chunks.
func (s *Store) Waiting() int64 { return s.demand.waiting.Load() }

// Flush makes durable what was kept so far.
func (s *Store) Flush() { s.flushAll() }

// ForgetMemory drops the chunks that wait in memory.
func (s *Store) ForgetMemory() { s.mem.drop() }
