package blobs

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"hash"
	"io"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/registry"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// entry is one blob; see the states in the package comment.
type entry struct {
	key  key                // immutable
	desc ocispec.Descriptor // immutable

	// All of these are protected by Cache.mu; file may be used by who holds the entry.
	refs     int // readers and the download
	running  bool
	complete bool
	file     *os.File // nil when refs is 0
	spot     *list.Element
	noted    time.Time          // when the file's time was set
	cancel   context.CancelFunc // of the last download
	timer    *time.Timer        // gives it up, when nobody reads it

	hash hash.Hash   // of what is there; belongs to the download
	work *sched.Work // of the download, for all who read; immutable

	mu      sync.Mutex
	filled  int64         // bytes that can be read; protected by mu
	err     error         // why the last download failed; protected by mu
	by      *Reader       // who began it, nil when it is complete; protected by mu
	changed chan struct{} // closed when one of these changes; protected by mu
}

func counts(size int64) int64 { return max(size, least) }

func (e *entry) counts() int64 { return counts(e.desc.Size) }

// serves tells whether the entry is the right place for what r wants. A download
// that has stopped goes on for readers that want a lot of it. Precondition:
// Cache.mu is held.
func (e *entry) serves(r *Reader, ahead int64) bool {
	if e.complete || e.has(r.at+r.left) {
		return true
	}
	filled, _, _, _ := e.state()
	near := r.at-filled <= max(ahead, reach*r.left)
	return near && (e.running || r.left >= min(e.desc.Size, large))
}

// state returns what readers wait for: changed is closed when it is another.
func (e *entry) state() (filled int64, by *Reader, changed <-chan struct{}, err error) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.filled, e.by, e.changed, e.err
}

func (e *entry) has(end int64) bool {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.filled >= end
}

// change changes what readers wait for.
func (e *entry) change(do func()) {
	e.mu.Lock()
	defer e.mu.Unlock()
	do()
	close(e.changed)
	e.changed = make(chan struct{})
}

// start begins the download, or goes on with it, for r. Precondition: Cache.mu is
// held, and r holds the entry.
func (c *Cache) start(r *Reader) {
	e := r.e
	if e.running || e.complete || c.closed || c.entries[e.key] != e {
		return
	}
	var ctx context.Context
	ctx, e.cancel = context.WithCancel(sched.With(c.ctx, e.work))
	e.running = true
	c.filling++
	e.refs++
	e.change(func() { e.err, e.by = nil, r })
	c.stats.downloads.Add(1)
	cancel := e.cancel
	c.fills.Go(func() {
		defer cancel()
		err := c.fill(ctx, e, r.from)
		c.end(e, err)
	})
}

// end notes how a download ended.
func (c *Cache) end(e *entry, err error) {
	c.mu.Lock()
	e.running = false
	c.filling--
	if err == nil {
		err = c.finish(e)
	}
	if err == nil {
		e.change(func() { e.by = nil }) // with its login
	} else {
		e.change(func() { e.err = err })
		if errdefs.IsDataLoss(err) || errors.Is(err, errDisk) {
			c.drop(e)
		}
		c.explain(e, err)
	}
	c.mu.Unlock()
	c.release(e)
}

func (c *Cache) explain(e *entry, err error) {
	log := c.log.With("blob", e.desc.Digest, "error", err)
	switch {
	case errdefs.IsDataLoss(err):
		log.Error("a registry sent a blob with wrong bytes; it is thrown away and its readers are broken off")
	case errors.Is(err, errDisk):
		log.Warn("a blob cannot be kept; readers go on by themselves: make room")
	case c.ctx.Err() == nil:
		log.Debug("the download of a blob failed")
	}
}

// errDisk says that the node could not keep what came.
var errDisk = errors.New("the blob cannot be written to the node's disk")

// fill downloads what is missing, verifies the whole and makes it durable. Who gave
// wrong bytes is blamed. The entry is held.
func (c *Cache) fill(ctx context.Context, e *entry, from Origin) error {
	ctx, trail := registry.WithTrail(ctx)
	err := c.download(ctx, e, from)
	if errdefs.IsDataLoss(err) && trail.Blame(err) {
		return errors.Join(err, ErrAgain)
	}
	return err
}

func (c *Cache) download(ctx context.Context, e *entry, from Origin) error {
	filled, _, _, _ := e.state()
	body, done, err := c.resume(ctx, from, e.desc, filled)
	if err != nil {
		return err
	}
	defer done()
	defer body.Close()
	buf := make([]byte, piece)
	for filled < e.desc.Size {
		n, err := io.ReadAtLeast(body, buf[:min(piece, e.desc.Size-filled)], 1)
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = fmt.Errorf("blob %s ends after %d of %d bytes: %w", e.desc.Digest, filled, e.desc.Size, errdefs.ErrUnavailable)
			}
			return err
		}
		c.stats.received.Add(int64(n))
		leave, err := c.cfg.Disk.Enter(ctx)
		if err != nil {
			return err
		}
		err = e.put(buf[:n], filled)
		leave()
		if err != nil {
			return err
		}
		filled += int64(n)
	}
	if err := e.file.Sync(); err != nil {
		return errors.Join(errDisk, err)
	}
	return nil
}

// resume reads the blob from off on. done is called when the body is closed.
func (c *Cache) resume(ctx context.Context, from Origin, desc ocispec.Descriptor, off int64) (body io.ReadCloser, done func(), err error) {
	if off == 0 {
		select {
		case c.fast <- struct{}{}:
			if body, err = from.Open(ctx, desc); err != nil {
				<-c.fast
			}
			return body, func() { <-c.fast }, err
		default:
		}
	}
	body, err = from.Range(ctx, desc.Digest, off, desc.Size-off)
	return body, func() {}, err
}

// put keeps the bytes that come next and lets readers have them; the last ones only
// when all are right.
func (e *entry) put(b []byte, off int64) error {
	_, _ = e.hash.Write(b) // never fails
	if end := off + int64(len(b)); end == e.desc.Size {
		if got := digest.NewDigest(e.desc.Digest.Algorithm(), e.hash); got != e.desc.Digest {
			return fmt.Errorf("blob %s has digest %s: %w", e.desc.Digest, got, errdefs.ErrDataLoss)
		}
	}
	if _, err := e.file.WriteAt(b, off); err != nil {
		return errors.Join(errDisk, err)
	}
	e.change(func() { e.filled += int64(len(b)) })
	return nil
}
