package store

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/rootfs/store/shared"
)

// Config says where a store is and what it may use. Zero values mean the
// defaults given.
type Config struct {
	Dir          string        // created when missing
	Keep         bool          // keep chunks on disk; otherwise only Memory bytes of them
	Window       int64         // bytes that a demand read fetches, default 1 MiB
	MaxWindow    int64         // bytes up to which sequential reads grow it, default 8 MiB; never over a quarter of Memory without Keep
	Memory       int64         // bound of chunk buffers in bytes, default 16 MiB (64 MiB with Keep)
	Stall        time.Duration // how long a source may go without a byte, default 30 s
	Patience     time.Duration // how long a demand fetch asks again when no source works, default 0: not at all
	FillParallel int           // fetches that one Fill has in flight, default 4
	Dedup        int           // chunks that are remembered to find equal ones, about 26 bytes each, default 2 Mi with Keep; negative: none
	Log          *slog.Logger  // default: none

	// Sched says who goes first where fetches wait, for the disk and for memory; sources
	// take from it, by sched.From, how urgent a fetch is. nil: there are no classes.
	Sched *sched.Scheduler

	// Quota bounds what segments and complete files take of the disk, in bytes; 0: only
	// the disk does. Above High, default 95 % of it, bytes of images that nobody has
	// open, or that only the least of several classes has, are given up until Low, default
	// 85 %, is reached. What finds no room even so
	// is delivered and not kept.
	Quota, High, Low int64
	// Hold keeps everything until Release is called: whoever takes over mounts of an
	// earlier process opens and pins their images first.
	Hold bool

	// Complete, when set, is called when the last missing chunk of a segment has
	// been fetched: at most once for as long as the segment is open, not for what
	// Ingest brings. It runs in a goroutine of its own, without locks, and may use
	// the store; Close waits for it.
	Complete func(id index.ID)
}

// Store keeps the segments of one node or one guest. Its methods may be called
// at the same time from any goroutine.
type Store struct {
	cfg      Config // with defaults, immutable
	log      *slog.Logger
	dir      layout
	inMemory bool // dir is on a tmpfs, immutable
	lock     *os.File
	ctx      context.Context // ends at Close; the root of every fetch
	cancel   context.CancelFunc
	wg       sync.WaitGroup // housekeeping and flushes of ingested segments
	mem      *memory
	known    *known
	usage    *usage
	room     *room
	scanned  chan struct{} // closed when the chunks on disk are known
	surveyed chan struct{} // closed when what takes the disk is known
	dropped  atomic.Bool   // a segment has lost chunks since links were checked
	demand   gate
	stats    counters

	// How Fill shares the link; tests change them before the first read.
	fillQuiet    time.Duration // without demand before Fill continues
	fillPatience time.Duration // after which Fill continues all the same

	syncFile func(*os.File) error // of segments' data; tests change it before the first read

	linking sync.RWMutex      // held while a link is made
	leaving map[index.ID]bool // segments that are about to be cut down or removed: no link to them is made; protected by linking

	mu         sync.Mutex
	closed     bool                       // protected by mu, as all below
	records    map[digest.Digest]record   // images on disk
	images     map[digest.Digest]*image   // open ones
	segments   map[index.ID]*segment      // open ones
	handles    map[*handle]bool           // whoever reads them
	left       map[index.ID]*shared.State // of closed segments, while keepShares
	keepShares bool                       // state files outlive their segments
	ingested   map[index.ID]bool          // by this process and not yet part of an image: GC leaves them
	pinned     map[digest.Digest]bool     // images whose bytes are not given up
}

const (
	housekeepEvery = 5 * time.Second // flush of bitmaps, age of memory
	keepUnread     = time.Minute     // how long a chunk in memory waits for its reader
)

// Open opens the store in cfg.Dir and removes what an earlier process left half
// done. It fails with ErrFailedPrecondition when another process has it open.
func Open(cfg Config) (*Store, error) { return open(cfg, extentSize, (*os.File).Sync) }

func open(cfg Config, extent int64, sync func(*os.File) error) (*Store, error) {
	setDefaults(&cfg)
	s := &Store{
		cfg: cfg, log: cfg.Log, dir: layout(cfg.Dir), mem: newMemory(cfg.Memory, cfg.Sched),
		known: newKnown(cfg.Dedup), scanned: make(chan struct{}),
		usage: newUsage(extent, cfg.Quota), room: newRoom(cfg.Hold), surveyed: make(chan struct{}),
		records: map[digest.Digest]record{}, images: map[digest.Digest]*image{},
		segments: map[index.ID]*segment{}, handles: map[*handle]bool{}, left: map[index.ID]*shared.State{}, ingested: map[index.ID]bool{},
		fillQuiet: 20 * time.Millisecond, fillPatience: time.Second,
		syncFile: sync,
	}
	if err := s.openDir(); err != nil {
		return nil, fmt.Errorf("open store %s: %w", cfg.Dir, err)
	}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.wg.Go(s.housekeep)
	if s.known.limit > 0 {
		s.wg.Go(s.scan)
	}
	if cfg.Keep {
		s.wg.Go(s.survey)
		s.wg.Go(s.makeRoom)
	}
	return s, nil
}

func setDefaults(c *Config) {
	if c.Window <= 0 {
		c.Window = 1 << 20
	}
	if c.MaxWindow <= 0 {
		c.MaxWindow = 8 << 20
	}
	if c.Memory <= 0 {
		c.Memory = 16 << 20
		if c.Keep {
			c.Memory = 64 << 20
		}
	}
	if !c.Keep { // two windows of a stream and a neighbour's must fit
		c.MaxWindow = min(c.MaxWindow, c.Memory/4)
	}
	c.MaxWindow = max(c.MaxWindow, c.Window)
	if c.Stall <= 0 {
		c.Stall = 30 * time.Second
	}
	if c.Dedup == 0 {
		c.Dedup = 2 << 20
	}
	if c.Dedup < 0 || !c.Keep {
		c.Dedup = 0
	}
	if c.High <= 0 || c.High > c.Quota {
		c.High = c.Quota / 100 * 95
	}
	if c.Low <= 0 || c.Low > c.High {
		c.Low = min(c.Quota/100*85, c.High)
	}
	if c.FillParallel <= 0 {
		c.FillParallel = 4
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
}

func (s *Store) openDir() (err error) {
	if err := s.dir.make(); err != nil {
		return err
	}
	if s.inMemory, err = isInMemory(s.cfg.Dir); err != nil {
		return err
	}
	if s.lock, err = lockFile(filepath.Join(s.cfg.Dir, "lock")); err != nil {
		return err
	}
	if err = shared.Retire(s.dir.shared()); err == nil { // before any byte that they speak of may go
		err = s.dir.clearTemp()
	}
	if err == nil {
		err = s.loadRecords()
	}
	if err != nil {
		_ = s.lock.Close() // the error that counts is err
	}
	return err
}

func lockFile(name string) (*os.File, error) {
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = fmt.Errorf("another process has it open; stop that one or use another directory: %w", errdefs.ErrFailedPrecondition)
	}
	if err != nil {
		_ = f.Close() // nothing was written
		return nil, err
	}
	return f, nil
}

// housekeep makes kept chunks durable and forgets chunks nobody came for.
func (s *Store) housekeep() {
	tick := time.NewTicker(housekeepEvery)
	defer tick.Stop()
	for {
		select {
		case <-s.ctx.Done():
			return
		case now := <-tick.C:
			s.mem.expire(now.Add(-keepUnread))
			s.flushAll()
		}
	}
}

// flushAll makes durable what the open segments have kept so far. When the disk
// has lost some of it, so have those that are linked there.
func (s *Store) flushAll() {
	s.each(func(g *segment) bool { return g.dirty.Load() }, (*segment).flush)
	if s.dropped.Swap(false) {
		s.each(func(g *segment) bool { return g.links.Load() != nil }, (*segment).checkLinks)
	}
	s.saveUses()
}

// each calls do for the open segments that are chosen, without locks.
func (s *Store) each(choose func(g *segment) bool, do func(g *segment)) {
	s.mu.Lock()
	var chosen []*segment
	for _, g := range s.segments {
		if choose(g) {
			g.refs++
			chosen = append(chosen, g)
		}
	}
	s.mu.Unlock()
	for _, g := range chosen {
		do(g)
		s.release(g)
	}
}

// Close ends all reads and fetches, makes what was kept durable and releases
// the directory. Images that are still open are closed. What they share can be read
// on until the store is opened again (KeepShares). It is idempotent.
func (s *Store) Close() error {
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed, s.keepShares = true, true // no segment is opened any more: nothing goes
	s.cancel()
	open := slices.Collect(maps.Keys(s.handles))
	s.mu.Unlock()
	for _, h := range open {
		h.close()
	}
	s.wg.Wait()
	s.saveUses()
	s.mem.drop()
	return errors.Join(s.leaveShares(), s.lock.Close())
}
