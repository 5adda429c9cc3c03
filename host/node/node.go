// Package node is what the host does once for all its sandboxes: it resolves
// references, finds or builds the index of each layer, keeps segments in the
// store, and lets images be read out of there or, where bytes are missing, out
// of the registry. It knows nothing of sandboxes and who may read what.
//
// # Files
//
//	layout                              marks the directory as a node's
//	layers/<algorithm>/<hex>            encoded layer index, built from the verified blob
//	layers/<algorithm>/<hex>.<by hex>   the same, taken from what has that digest
//	images/<algorithm>/<hex>/           one image; its rename makes it exist
//	    record.json manifest.json config.json artifact.json index, and what
//	    binds a published index: parent.json bound.json
//	    profile-all.json profile-<key>.json, of package profile
//	refs/<hex>.json                     what a reference meant when it was prepared last
//	pinned.json                         patterns of references that were pinned
//	store/                              of package store
//	blobs/                              of package blobs
//	tmp/                                emptied at the start
//
// A layer index that was taken from something published (a TOC, an index
// artifact) is used for images that lead to this very thing and for no other:
// the repository of one image must not be able to say what a layer of another
// holds. So an image with an index that the manifest does not bind counts only
// for references to the repository that it was published in (record.Origin).
//
// # Memory
//
// Entries of layers and bootstraps are in memory only while an image is
// prepared. What reading needs of an image (chunk tables) is loaded when the
// first sandbox gets it; what reading its registry needs (extents, checkpoints
// with their windows) when bytes are missing, and then under a bound.
//
// # Locks
//
//	Node.pinning and Node.profiling, before Node.mu
//	Node.mu, flights.mu, accessCache.mu, builds.mu: leaves; under Node.mu files are renamed and
//	removed, nothing is waited for.
package node

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/blobs"
	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/rootfs/store"
)

// Config of a Node.
type Config struct {
	Root string // directory of everything the node keeps; made when missing
	// Registry is how images are fetched; it stays the caller's.
	Registry *registry.Client
	// Sched says whose work goes first, where it waits for the CPU or to build layers; it
	// should be that of Registry. Nil is the order in which it comes.
	Sched  *sched.Scheduler
	Layers int // of one registry, built at a time; 8 when 0
	// Blobs is the room for compressed blobs in bytes, at most an eighth of Quota; with
	// 0 none are kept.
	Blobs int64
	// Mirrored says that other programs of the node read blobs, too: a layer that is
	// downloaded whole, to be indexed, is kept for them. They want it when it cannot be
	// served lazily after all.
	Mirrored bool
	// Quota says how many bytes store and blobs may take of a file system that has so
	// many; 0 or nil is no bound. High and Low are per cent of the store's part; 95 and 85
	// when 0.
	Quota     func(disk int64) (int64, error)
	High, Low int
	// Pinned are patterns of references whose images' bytes are never given up, see Match.
	Pinned   []string
	Profiles Profiles
	Log      *slog.Logger
}

// Node prepares images and reads them.
type Node struct {
	cfg    Config
	log    *slog.Logger
	files  files
	store  *store.Store
	blobs  *blobs.Cache
	ctx    context.Context // of everything that nobody waits for; ends with Close
	cancel context.CancelFunc
	// patience is how long a tag that was resolved before is asked for.
	patience   time.Duration
	background sync.WaitGroup // what nobody waits for but Close
	building   *builds

	prepares flights[target, *Prepared]      // by reference
	indexing flights[digest.Digest, indexed] // by manifest
	layers   flights[layerKey, *layerIndex]  // by blob
	access   *accessCache

	mu       sync.Mutex
	images   map[digest.Digest]*record   // complete ones; protected by mu, records immutable
	leases   map[digest.Digest]int       // images being read; protected by mu
	pins     map[digest.Digest]int       // layers that a prepare counts on; protected by mu
	jobs     map[string]*job             // prepares by reference; protected by mu
	fetching map[digest.Digest]*progress // layers under way by manifest; protected by mu

	anyForged atomic.Bool        // forged is not empty
	forged    map[layerKey]error // published indexes that are not used any more; protected by mu

	replays    map[replayKey]*replay                 // under way; protected by mu
	replayed   atomic.Int64                          // bytes
	recordings map[digest.Digest]map[*recording]bool // under way; protected by mu
	fills      map[digest.Digest]chan struct{}       // under way, closed when they end; protected by mu
	profiling  sync.Mutex                            // over profiles on the disk, and the removal of their images; before mu

	pinning sync.Mutex // over pinned, and what the store is told of it; before mu
	pinned  []string   // patterns that Pin was given; protected by pinning
}

// sourceStall is after how long without a byte a registry is given up. The
// registry's client tries again several times before.
const sourceStall = time.Minute

// Open opens the node's directory. ErrFailedPrecondition when another process
// has it.
func Open(cfg Config) (*Node, error) {
	if cfg.Layers == 0 {
		cfg.Layers = 8
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Sched == nil {
		var err error
		if cfg.Sched, err = sched.New(sched.Config{Off: true}); err != nil {
			return nil, err
		}
	}
	n := &Node{
		cfg: cfg, log: cfg.Log, files: files(cfg.Root), patience: 10 * time.Second,
		building: newBuilds(cfg.Sched, cfg.Layers),
		images:   map[digest.Digest]*record{}, leases: map[digest.Digest]int{},
		pins: map[digest.Digest]int{}, jobs: map[string]*job{},
		fetching: map[digest.Digest]*progress{}, forged: map[layerKey]error{},
		replays: map[replayKey]*replay{}, recordings: map[digest.Digest]map[*recording]bool{}, fills: map[digest.Digest]chan struct{}{},
	}
	n.ctx, n.cancel = context.WithCancel(context.Background())
	if err := n.open(); err != nil {
		return nil, fmt.Errorf("open node %s: %w", cfg.Root, err)
	}
	n.prepares.init(n.ctx)
	n.indexing.init(n.ctx)
	n.layers.init(n.ctx)
	n.access = newAccessCache(n.ctx, accessBytes, n.readLayer)
	return n, nil
}

// open opens what is in the node's directory.
func (n *Node) open() error {
	if err := n.files.claim(); err != nil {
		return err
	}
	bounds, err := n.bounds()
	if err != nil {
		return err
	}
	if n.blobs, err = blobs.Open(blobs.Config{Dir: n.files.blobs(), Size: bounds.blobs, Disk: n.cfg.Sched.Disk(), Log: n.log}); err != nil {
		return err
	}
	if n.store, err = store.Open(store.Config{
		Dir: n.files.store(), Keep: true, Quota: bounds.quota, High: bounds.high, Low: bounds.low, Hold: true,
		Stall: sourceStall, Complete: n.audit, Sched: n.cfg.Sched, Log: n.log,
	}); err != nil {
		return errors.Join(err, n.blobs.Close())
	}
	if err = n.files.create(); err == nil {
		err = n.restore()
	}
	if err == nil {
		err = n.restorePinned()
	}
	if err != nil {
		return errors.Join(err, n.blobs.Close(), n.store.Close())
	}
	return nil
}

// Release lets the store give bytes up, when what is in use has been leased again
// after a restart. It is idempotent.
func (n *Node) Release() { n.store.Release() }

// Close cancels what is being prepared, waits for it, and closes the store.
// Leases must have been released.
func (n *Node) Close() error {
	n.cancel()
	n.prepares.close()
	n.indexing.close()
	n.layers.close()
	n.access.close()
	n.background.Wait()
	return errors.Join(n.blobs.Close(), n.store.Close())
}

// Blobs are the compressed blobs that the node keeps.
func (n *Node) Blobs() *blobs.Cache { return n.blobs }

// Stats of a node.
type Stats struct {
	Store         store.Stats
	RegistryBytes int64 // received since the client was made
	Registry      registry.Stats
	Images        int
	Replays       int   // of start-up profiles, under way
	ReplayedBytes int64 // that were fetched so, or were there
}

// Stats returns the node's counters.
func (n *Node) Stats() Stats {
	n.mu.Lock()
	images, replays := len(n.images), len(n.replays)
	n.mu.Unlock()
	from := n.cfg.Registry.Stats()
	return Stats{
		Store: n.store.Stats(), RegistryBytes: from.Bytes, Registry: from, Images: images,
		Replays: replays, ReplayedBytes: n.replayed.Load(),
	}
}

// known returns the record of a complete image.
func (n *Node) known(d digest.Digest) (*record, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	r, ok := n.images[d]
	return r, ok
}
