package store

import (
	"cmp"
	"slices"
	"sync"
	"sync/atomic"
	"time"
)

// Stats says what a store has done since it was opened.
type Stats struct {
	Hits, HitBytes     int64         // reads that did not wait, and their bytes
	Misses, MissBytes  int64         // reads that waited for a fetch
	Wait               time.Duration // of all misses together
	Classes            []ClassStats  // the same, by the class of who read; by name
	VerifyFailures     int64         // chunks with wrong bytes
	KeepFailures       int64         // chunks that the disk did not take, or lost before they were synced
	MemoryBytes        int64         // chunk buffers in use now
	Sources            []SourceStats // by name
	SharedChunks       int64         // became present because another segment of the store, or the same, has them
	SharedBytes        int64         // of those chunks: neither fetched (or, after Ingest, kept) a second time
	ImagesOpen         int
	SegmentsOpen       int
	FetchesInFlight    int64
	BackgroundHeldBack int64 // times that Fill waited for demand reads

	Replayed     int64 // bytes that Replay began to fetch
	ReplayUsed   int64 // of those, of chunks that were read
	ReplayWasted int64 // and of chunks that were not until the recording ended
}

// SourceStats are the counters of all sources of one name.
type SourceStats struct {
	Name     string
	Requests int64
	Bytes    int64 // received, right or wrong
	Errors   int64
}

type counters struct {
	verifyFailures, keepFailures       atomic.Int64
	sharedChunks, sharedBytes          atomic.Int64
	fetches, ahead, heldBack           atomic.Int64 // ahead: bytes of readahead in flight
	keepLogged, dropLogged             sync.Once
	replayed, replayUsed, replayWasted atomic.Int64

	mu      sync.Mutex
	sources map[string]*sourceCounters // protected by mu
	classes map[string]*classCounters  // by name; protected by mu
}

type sourceCounters struct{ requests, bytes, errors atomic.Int64 }

func (c *counters) source(name string) *sourceCounters {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.sources == nil {
		c.sources = map[string]*sourceCounters{}
	}
	if c.sources[name] == nil {
		c.sources[name] = &sourceCounters{}
	}
	return c.sources[name]
}

func (c *counters) sourceStats() []SourceStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []SourceStats
	for name, n := range c.sources {
		out = append(out, SourceStats{Name: name, Requests: n.requests.Load(), Bytes: n.bytes.Load(), Errors: n.errors.Load()})
	}
	slices.SortFunc(out, func(a, b SourceStats) int { return cmp.Compare(a.Name, b.Name) })
	return out
}

// Stats returns the counters. They are read one by one, so sums may be off by
// what happens meanwhile.
func (s *Store) Stats() Stats {
	c := &s.stats
	s.mu.Lock()
	images, segments := len(s.images), len(s.segments)
	s.mu.Unlock()
	out := Stats{
		Classes:        c.classStats(),
		VerifyFailures: c.verifyFailures.Load(), KeepFailures: c.keepFailures.Load(),
		SharedChunks: c.sharedChunks.Load(), SharedBytes: c.sharedBytes.Load(),
		MemoryBytes: s.mem.inUse(), Sources: c.sourceStats(),
		ImagesOpen: images, SegmentsOpen: segments,
		FetchesInFlight: c.fetches.Load(), BackgroundHeldBack: c.heldBack.Load(),
		Replayed: c.replayed.Load(), ReplayUsed: c.replayUsed.Load(), ReplayWasted: c.replayWasted.Load(),
	}
	for i := range out.Classes {
		out.add(&out.Classes[i])
	}
	return out
}
