// Package blobs keeps compressed blobs of registries on the node, as they were
// asked for: however many want one at the same time or later, it is downloaded once.
//
// # What is downloaded
//
// A request that begins at the start of a blob and wants all of it, or at least
// [large] bytes, begins a download of the whole blob; clients that fetch a blob in
// parallel ranges begin so, too. Smaller ranges never do: a guest that wants one
// chunk must not make the node fetch gigabytes. They are answered from what is
// here, and otherwise passed on to the registry and not kept.
//
// A download is as urgent as the most important of its readers.
//
// Readers follow a download that is under way. One that begins further ahead of it
// than [ahead], or four times what it asks for, goes to the registry by itself.
//
// # An entry
//
//	filling   a goroutine downloads it: it ends, fails, or is cancelled
//	          when nobody has read for a while
//	stopped   a download failed; what is there is read and kept for a while. The next
//	          reader that wants more goes on from there, with its own origin
//	complete  verified and durable: it stays until others need the room
//	gone      not found any more; who reads it already reads on
//
// Nothing counts as complete before its digest was compared, and no reader gets the
// last bytes before that. A blob with a wrong digest is thrown away, and readers
// under way are broken off with ErrDataLoss.
//
// # Files
//
//	<algorithm>-<hex>-<registry>       complete: renamed after its bytes were synced
//	<algorithm>-<hex>-<registry>.part  removed at the start
//
// Times of modification are those of the last use, so that a restart knows the order.
//
// # Who may read what
//
// The cache answers whoever asks. That a caller may read a blob has to be known
// before; see package mirror, and the grants of package relay. What came from one
// registry is for those who ask that registry: another one, which only says that it
// has a blob with this digest, opens nothing.
//
// Locks: Cache.mu, then entry.mu. Under Cache.mu files are opened, renamed and
// removed, nothing is waited for.
package blobs

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

const (
	// large is how many bytes of a blob's beginning are taken for the wish to have
	// it all. Clients that fetch in parallel ask for 8 MiB and more at a time.
	large = 4 << 20
	// ahead is how many bytes a reader may always have to wait for: clients that fetch
	// in parallel are so far ahead with the small rest of a blob. reach is how many
	// times what it asks for.
	ahead = 32 << 20
	reach = 4
	// linger is how long a download that nobody reads goes on, and what a failed
	// one has left stays.
	linger = 30 * time.Second
	// least is what an entry counts at least, in bytes, so that the room bounds
	// their number, too.
	least = 64 << 10
	// piece is how much is downloaded at a time, in bytes.
	piece = 256 << 10
	// parallel is how many downloads may be made of several ranges at a time, which
	// takes memory; further ones are of one.
	parallel = 4
	// maxFills is how many downloads there may be: each has a piece in memory. Further
	// blobs are passed on.
	maxFills = 256
)

// ErrAgain is joined to ErrDataLoss where the next download asks another host, as
// the one that gave wrong bytes is left alone for a while.
var ErrAgain = errors.New("another host is asked from now on")

// Origin is where a blob is downloaded from. A *registry.Repository is one.
type Origin interface {
	// Host is the "host:port" of the registry, which mirrors stand in for.
	Host() string
	// Open reads the whole blob in order, as fast as it can.
	Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error)
	// Range reads the bytes [off, off+n).
	Range(ctx context.Context, d digest.Digest, off, n int64) (io.ReadCloser, error)
}

// Config of a Cache.
type Config struct {
	Dir string // made when missing; nothing else may be in it
	// Size is how many bytes it may take on the disk; with 0 nothing is kept and
	// every request is passed on.
	Size int64
	// Disk is what each piece waits for before it is written; nil lets it pass.
	Disk *sched.Slots
	Log  *slog.Logger
}

// Cache is the blobs of one node. Its methods may be called at the same time.
type Cache struct {
	cfg    Config
	log    *slog.Logger
	linger time.Duration
	ahead  int64
	most   int             // downloads at a time
	ctx    context.Context // of downloads; ends with Close
	cancel context.CancelFunc
	fills  sync.WaitGroup
	fast   chan struct{} // one element for each download of several ranges
	stats  counters

	mu      sync.Mutex
	closed  bool           // protected by mu
	entries map[key]*entry // protected by mu
	order   *list.List     // complete entries, the last used first; protected by mu
	used    int64          // bytes, of entries as they count; protected by mu
	filling int            // downloads under way; protected by mu
}

type counters struct{ downloads, received, hits, passed, evicted atomic.Int64 }

// Stats counts what a Cache has done since Open.
type Stats struct {
	Downloads int64 // begun or gone on with
	Received  int64 // bytes, by downloads
	Hits      int64 // requests that were answered from here, downloads under way included
	Passed    int64 // requests that were passed on
	Evicted   int64 // blobs that made room
	Used      int64 // bytes of the room that are taken
	Blobs     int   // complete ones
}

// Stats returns the counters.
func (c *Cache) Stats() Stats {
	c.mu.Lock()
	used, blobs := c.used, c.order.Len()
	c.mu.Unlock()
	return Stats{
		Downloads: c.stats.downloads.Load(), Received: c.stats.received.Load(), Hits: c.stats.hits.Load(),
		Passed: c.stats.passed.Load(), Evicted: c.stats.evicted.Load(), Used: used, Blobs: blobs,
	}
}

// Open opens the cache on what is in its directory.
func Open(cfg Config) (*Cache, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	c := &Cache{
		cfg: cfg, log: cfg.Log, linger: linger, ahead: ahead, most: maxFills, fast: make(chan struct{}, parallel),
		entries: map[key]*entry{}, order: list.New(),
	}
	c.ctx, c.cancel = context.WithCancel(context.Background())
	if err := os.MkdirAll(cfg.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("open cache of blobs: %w", err)
	}
	if err := c.restore(); err != nil {
		return nil, fmt.Errorf("open cache of blobs %s: %w", cfg.Dir, err)
	}
	return c, nil
}

// Close ends all downloads and waits for them. Readers must have been closed.
func (c *Cache) Close() error {
	c.mu.Lock()
	c.closed = true
	for _, e := range c.entries {
		if !e.complete {
			c.drop(e)
		}
	}
	c.mu.Unlock()
	c.cancel()
	c.fills.Wait()
	return nil
}

// Open returns the bytes [off, off+n) of the blob that desc names, out of the cache
// or from the origin; the package comment says which. The context covers the
// reading, too. What is passed on is not verified, as whoever reads a whole blob
// does that.
func (c *Cache) Open(ctx context.Context, from Origin, desc ocispec.Descriptor, off, n int64) (io.ReadCloser, error) {
	if err := desc.Digest.Validate(); err != nil {
		return nil, fmt.Errorf("open blob: %w", errors.Join(errdefs.ErrInvalidArgument, err))
	}
	if off < 0 || n < 0 || off > desc.Size || n > desc.Size-off {
		return nil, fmt.Errorf("range %d+%d of blob %s, which has %d bytes: %w", off, n, desc.Digest, desc.Size, errdefs.ErrInvalidArgument)
	}
	if n == 0 {
		return http.NoBody, nil
	}
	r := &Reader{c: c, ctx: ctx, from: from, desc: desc, at: off, left: n}
	if c.take(r) {
		c.stats.hits.Add(1)
		return r, nil
	}
	c.stats.passed.Add(1)
	return from.Range(ctx, desc.Digest, off, n)
}

// take gives r an entry to read, unless it has to go to the registry by itself.
func (c *Cache) take(r *Reader) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.closed {
		return false
	}
	id := keyOf(r.from, r.desc.Digest)
	e := c.entries[id]
	begin := r.at == 0 && r.left >= min(r.desc.Size, large)
	switch busy := c.filling >= c.most; {
	case e == nil && (!begin || busy || !c.room(r.desc.Size)):
		return false
	case e == nil:
		e = c.add(id, r.desc)
	case e.desc.Size != r.desc.Size: // one of two manifests is wrong
		return false
	case !e.serves(r, c.ahead), busy && !e.running && !e.complete:
		return false
	}
	if err := c.hold(e); err != nil {
		c.log.Warn("a blob cannot be kept or read; the registry is asked", "blob", e.desc.Digest, "error", err)
		c.drop(e)
		return false
	}
	r.e = e
	if !e.complete {
		r.unfollow = e.work.Follow(sched.From(r.ctx))
	}
	if !e.complete && !e.has(r.at+r.left) {
		c.start(r)
	}
	return true
}

// add makes an entry for a blob of which nothing is here. Precondition: mu is held,
// and there is room.
func (c *Cache) add(id key, desc ocispec.Descriptor) *entry {
	e := &entry{key: id, desc: desc, changed: make(chan struct{}), hash: desc.Digest.Algorithm().Hash(), work: sched.NewShared()}
	c.entries[id] = e
	c.used += e.counts()
	return e
}

// room makes room for a blob. Precondition: mu is held.
func (c *Cache) room(size int64) bool {
	need := counts(size)
	if need > c.cfg.Size {
		return false
	}
	c.shrink(c.cfg.Size - need)
	return c.used+need <= c.cfg.Size
}

// shrink drops what nobody reads, the least recently used first, until the rest takes
// limit bytes. Precondition: mu is held.
func (c *Cache) shrink(limit int64) {
	for at := c.order.Back(); at != nil && c.used > limit; {
		e := at.Value.(*entry)
		at = at.Prev()
		if e.refs == 0 {
			c.drop(e)
			c.stats.evicted.Add(1)
		}
	}
}

// drop makes an entry gone. Precondition: mu is held.
func (c *Cache) drop(e *entry) {
	if c.entries[e.key] != e {
		return // somebody else did
	}
	delete(c.entries, e.key)
	c.used -= e.counts()
	if e.spot != nil {
		c.order.Remove(e.spot)
	}
	if e.cancel != nil {
		e.cancel()
	}
	if e.timer != nil {
		e.timer.Stop()
	}
	if err := os.Remove(c.path(e)); err != nil && !errors.Is(err, os.ErrNotExist) {
		c.log.Warn("a blob that is not needed any more stays on the disk", "blob", e.desc.Digest, "error", err)
	}
}

// hold opens the entry's file for one more user. Precondition: mu is held.
func (c *Cache) hold(e *entry) (err error) {
	if e.timer != nil {
		e.timer.Stop()
		e.timer = nil
	}
	if e.refs == 0 {
		flags := os.O_RDWR | os.O_CREATE
		if e.complete {
			flags = os.O_RDONLY
		}
		if e.file, err = os.OpenFile(c.path(e), flags, 0o600); err != nil {
			return err
		}
	}
	e.refs++
	if e.complete {
		c.touch(e)
	}
	return nil
}

// touch notes that a complete entry is used. Precondition: mu is held.
func (c *Cache) touch(e *entry) {
	c.order.MoveToFront(e.spot)
	now := time.Now()
	if now.Sub(e.noted) < time.Minute {
		return
	}
	e.noted = now
	_ = os.Chtimes(c.path(e), now, now) // a blob that looks older than it is goes earlier
}

// release ends the use of one who held the entry. What is not complete is given up
// when nobody comes back to it.
func (c *Cache) release(e *entry) {
	c.mu.Lock()
	defer c.mu.Unlock()
	e.refs--
	if e.refs == 0 {
		_ = e.file.Close() // what counts as complete was synced
		e.file = nil
	}
	if alone := e.refs == 0 || e.refs == 1 && e.running; !alone || e.complete || c.entries[e.key] != e {
		return
	}
	if e.timer != nil {
		e.timer.Stop()
	}
	var t *time.Timer
	t = time.AfterFunc(c.linger, func() { c.expire(e, &t) })
	e.timer = t
}

// expire gives up an entry that nobody has read since the timer was set.
func (c *Cache) expire(e *entry, t **time.Timer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e.timer == *t && !e.complete {
		c.drop(e)
	}
}
