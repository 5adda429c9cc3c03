package mount

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"sync"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/mount/imagefs"
	"github.com/tatami-containers/tatami/rootfs/mount/session"
)

// Config of a Mounter. StateDir and Link are needed.
type Config struct {
	StateDir string
	Link     *session.Link
	// Prefer is tried first, the other path after it; "" means FilePath. Loop
	// is right for images that will be complete on a local disk.
	Prefer Path
	// ReadAhead of lowers in bytes; 0 means 512 KiB.
	ReadAhead int64
	// Requests and ReplyBytes bound the reads under way and the memory for
	// their data; 0 means the defaults of imagefs.
	Requests, ReplyBytes int64
	Log                  *slog.Logger // nil: silent
}

// Mounter mounts images on one session and keeps the mount table. Its methods
// may be called concurrently. Mount needs Serve to be running.
type Mounter struct {
	cfg    Config
	log    *slog.Logger
	table  table
	server *imagefs.Server
	locks  keyLocks
	probe  probe
	ended  chan struct{} // closed when the session is over: no RELEASE will come

	mu       sync.Mutex
	mounts   map[string]*Record
	lowers   map[digest.Digest]*lower // mounted or being mounted
	draining map[uint64]*lower        // by node
	raws     map[digest.Digest]*lower // exposed as files
	session  sessionRecord
}

// New opens the mount table. Call Restore before Serve.
func New(cfg Config) (*Mounter, error) {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.ReadAhead == 0 {
		cfg.ReadAhead = defaultReadAhead
	}
	if cfg.Prefer != "" && cfg.Prefer != FilePath && cfg.Prefer != LoopPath {
		return nil, fmt.Errorf("mount path %q is neither %q nor %q: %w", cfg.Prefer, FilePath, LoopPath, errdefs.ErrInvalidArgument)
	}
	if err := validateStateDir(cfg.StateDir); err != nil {
		return nil, err
	}
	t, err := openTable(cfg.StateDir)
	if err != nil {
		return nil, err
	}
	m := &Mounter{
		cfg: cfg, log: cfg.Log, table: t, ended: make(chan struct{}),
		mounts: make(map[string]*Record), lowers: make(map[digest.Digest]*lower), draining: make(map[uint64]*lower), raws: make(map[digest.Digest]*lower),
	}
	m.server, err = imagefs.New(imagefs.Config{
		Link: cfg.Link, Offer: cfg.Link.Offer(),
		Requests: cfg.Requests, ReplyBytes: cfg.ReplyBytes,
		Released: m.released, Log: cfg.Log,
	})
	return m, err
}

// Serve answers the session until ctx is done (nil) or the session is over
// (session.ErrEnded). It returns when every read under way has come back;
// those that had no answer are left for the next worker.
// It is called once.
func (m *Mounter) Serve(ctx context.Context) error {
	err := m.server.Serve(ctx)
	if errors.Is(err, session.ErrEnded) {
		close(m.ended)
	}
	return err
}

// Stats counts reads since the start of the process.
func (m *Mounter) Stats() imagefs.Stats { return m.server.Stats() }

// List returns the mounts, by ID.
func (m *Mounter) List() []Record {
	m.mu.Lock()
	defer m.mu.Unlock()
	var all []Record
	for _, id := range slices.Sorted(maps.Keys(m.mounts)) {
		all = append(all, *m.mounts[id])
	}
	return all
}

// get returns a copy of a record.
func (m *Mounter) get(id string) (Record, bool) {
	m.mu.Lock()
	defer m.mu.Unlock()
	r, ok := m.mounts[id]
	if !ok {
		return Record{}, false
	}
	return *r, true
}

// put writes a record and makes it known.
func (m *Mounter) put(r Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.putLocked(r)
}

func (m *Mounter) putLocked(r Record) error {
	if err := m.table.saveMount(&r); err != nil {
		return err
	}
	m.mounts[r.ID] = &r
	return nil
}

// putNew is put for a mount that must not touch what another one has.
func (m *Mounter) putNew(r Record) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, o := range m.mounts {
		if err := conflict(&r, o); err != nil {
			return err
		}
	}
	return m.putLocked(r)
}

func conflict(r, o *Record) error {
	switch {
	case o.ID == r.ID:
		return nil
	case o.Target == r.Target:
		return fmt.Errorf("mount %s of %s at %s: mount %s of %s is there; unmount it or choose another target: %w",
			r.ID, r.Reference, r.Target, o.ID, o.Reference, errdefs.ErrAlreadyExists)
	case r.Upper != "" && o.Upper == r.Upper:
		return fmt.Errorf("mount %s of %s: mount %s of %s uses the upper directory %s; give each mount its own: %w",
			r.ID, r.Reference, o.ID, o.Reference, r.Upper, errdefs.ErrAlreadyExists)
	}
	return nil
}

func (m *Mounter) forget(id string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	delete(m.mounts, id)
	return m.table.removeMount(id)
}

// newNode gives out a node id, on disk first: none is ever used twice in a
// session, because the kernel may still know it.
func (m *Mounter) newNode() (uint64, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	next := m.session
	if next.Session == "" { // Restore was not called
		next = sessionRecord{Version: recordVersion, Session: m.cfg.Link.ID(), NextNode: firstNode}
	}
	node := next.NextNode
	next.NextNode++
	if err := m.table.save(sessionFile, &next); err != nil {
		return 0, err
	}
	m.session = next
	return node, nil
}

// firstNode is the first id of an image file; 1 is the root directory.
const firstNode = 2

// fileName is unique for ever, as the node is: the kernel may remember names.
func fileName(manifest digest.Digest, node uint64) string {
	return fmt.Sprintf("%.12s-%d.erofs", manifest.Encoded(), node)
}

func (m *Mounter) filePath(name string) string { return filepath.Join(m.cfg.Link.Dir(), name) }

// closeFile closes an image that is an io.Closer.
func closeFile(f File) error {
	if c, ok := f.(io.Closer); ok {
		return c.Close()
	}
	return nil
}

// closeFile is for images that nobody waits for.
func (m *Mounter) closeFile(f File) { m.logUndone("close image", closeFile(f)) }

// logUndone reports leftovers that no caller waits for.
func (m *Mounter) logUndone(what string, err error) {
	if err != nil && !errors.Is(err, context.Canceled) {
		m.log.Error(what, "err", strings.ReplaceAll(err.Error(), "\n", "; "))
	}
}
