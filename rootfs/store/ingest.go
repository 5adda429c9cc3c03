package store

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// Ingest takes the plain bytes of one segment, in order, from whoever computes
// its table from the same bytes. It is for one goroutine.
type Ingest struct {
	s    *Store
	ctx  context.Context // of all waits
	f    *os.File        // in tmp; nil after Commit or Abort
	w    *bufio.Writer
	size int64 // bytes taken, zeros included
	held int64 // of those, bytes that count as the store's until Commit or Abort
}

const ingestBuffer = 256 << 10

// Ingest starts taking a new segment; its writes wait for their turn, as the work of
// ctx. It ends with Commit or Abort. It fails with ErrFailedPrecondition when the store
// keeps nothing.
func (s *Store) Ingest(ctx context.Context) (*Ingest, error) {
	if !s.cfg.Keep {
		return nil, fmt.Errorf("ingest a segment: the store keeps nothing: %w", errdefs.ErrFailedPrecondition)
	}
	f, err := os.CreateTemp(s.dir.temp(), "ingest-")
	if err != nil {
		return nil, fmt.Errorf("ingest a segment: %w", err)
	}
	n := &Ingest{s: s, ctx: ctx, f: f}
	n.w = bufio.NewWriterSize(roomy{n}, ingestBuffer)
	return n, nil
}

// roomy writes to the file of an Ingest. What it writes counts as the store's; when
// the disk or the quota is full, it has bytes given up and waits for that.
type roomy struct{ n *Ingest }

func (r roomy) Write(p []byte) (int, error) {
	s, ctx := r.n.s, r.n.ctx
	if s.exceeded(int64(len(p)), r.n.spare()) {
		s.awaitRoom(ctx, unix.EDQUOT) // what is ingested may exceed the quota even so
	}
	m, err := r.write(p)
	for err != nil && s.awaitRoom(ctx, err) {
		var k int
		k, err = r.write(p[m:])
		m += k
	}
	return m, err
}

func (r roomy) write(p []byte) (int, error) {
	leave, err := r.n.s.cfg.Sched.Disk().Enter(r.n.ctx)
	if err != nil {
		return 0, err
	}
	defer leave()
	m, err := r.n.f.Write(p)
	r.n.held += int64(m)
	r.n.s.usage.used.Add(int64(m))
	r.n.s.checkRoom(r.n.spare())
	return m, err
}

// spare says whether the ingest is the work of the class that yields.
func (n *Ingest) spare() bool { return n.s.spare(sched.From(n.ctx).Standing().Flow) }

// Write takes the next bytes.
func (n *Ingest) Write(p []byte) (int, error) {
	if n.f == nil {
		return 0, fmt.Errorf("ingest a segment: %w", os.ErrClosed)
	}
	m, err := n.w.Write(p)
	n.size += int64(m)
	if err != nil {
		return m, fmt.Errorf("ingest a segment: %w", err)
	}
	return m, nil
}

// WriteZeros takes count zero bytes, which become a hole in the file.
func (n *Ingest) WriteZeros(count int64) error {
	if n.f == nil || count < 0 {
		return fmt.Errorf("ingest %d zeros: %w", count, errdefs.ErrInvalidArgument)
	}
	err := n.w.Flush()
	if err == nil {
		n.size += count
		_, err = n.f.Seek(n.size, 0)
	}
	if err != nil {
		return fmt.Errorf("ingest a segment: %w", err)
	}
	return nil
}

// Commit makes what was written the complete segment of table t and returns its
// id. It can be read at once; it survives a crash a little later, when its data
// has been synced in the background or at Close. When that sync fails, the bytes
// are absent again. When the store has the segment
// completely already, the new bytes are dropped. Bytes are not compared with the
// digests: the caller has just computed these from them.
func (n *Ingest) Commit(t *index.Table) (index.ID, error) {
	if n.f == nil {
		return "", fmt.Errorf("commit a segment: %w", os.ErrClosed)
	}
	id, err := n.commit(t)
	n.Abort()
	if err != nil {
		return "", fmt.Errorf("commit segment: %w", err)
	}
	return id, nil
}

func (n *Ingest) commit(t *index.Table) (index.ID, error) {
	if err := t.Validate(); err != nil {
		return "", err
	}
	if n.size != t.Size {
		return "", fmt.Errorf("%d bytes were written, the table says %d: %w", n.size, t.Size, errdefs.ErrInvalidArgument)
	}
	if err := errors.Join(n.w.Flush(), n.f.Truncate(n.size)); err != nil {
		return "", err
	}
	id := t.ID()
	n.s.mu.Lock()
	defer n.s.mu.Unlock()
	g, err := n.s.useSegment(id, t)
	if err != nil {
		return "", err
	}
	if err := n.takeOver(g); err != nil {
		n.s.unuseSegment(g)
		return "", err
	}
	n.s.ingested[id] = true
	n.s.wg.Go(func() { // not durable until this is done
		g.share()
		g.flush()
		n.s.mu.Lock()
		defer n.s.mu.Unlock()
		n.s.unuseSegment(g)
	})
	return id, nil
}

// takeOver puts the written file in the place of the segment's own. It is not
// synced yet, so the bits of the file before must be gone before it has the
// name. Precondition: Store.mu is held.
func (n *Ingest) takeOver(g *segment) error {
	g.flushMu.Lock()
	defer g.flushMu.Unlock()
	if g.missing.Load() == 0 {
		return nil
	}
	dir := n.s.dir
	if err := remove(dir.segment(g.id, bitsFile)); err != nil {
		return err
	}
	if err := os.Rename(n.f.Name(), dir.segment(g.id, dataFile)); err != nil {
		return err
	}
	g.moveTo(&home{file: n.f, own: true}, nil, false)
	n.f = nil // it is the segment's now
	return nil
}

// Abort drops what was written. After Commit it does nothing.
func (n *Ingest) Abort() {
	n.s.usage.used.Add(-n.held)
	n.held = 0
	if n.f == nil {
		return
	}
	_ = n.f.Close() // dropped
	_ = os.Remove(n.f.Name())
	n.f = nil
}
