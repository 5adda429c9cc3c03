package node

import (
	"context"
	"errors"
	"os"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store"
)

// Size is the length of the one-file image in bytes.
func (l *Lease) Size() int64 { return l.open.Size() }

// Segments lists the image's segments by rising offset, behind its bootstrap.
func (l *Lease) Segments() []index.Segment { return l.open.Segments() }

// ReadAt reads the one-file image as store.Image does.
func (l *Lease) ReadAt(ctx context.Context, p []byte, off int64) (int, error) {
	if err := l.n.forgedIn(l.record); err != nil {
		return 0, err
	}
	return l.open.ReadAt(ctx, p, off)
}

// KeepShares says that this process is about to end and that another one will take
// its place: until then, what was shared can be read (store.Store.KeepShares).
func (n *Node) KeepShares() { n.store.KeepShares() }

// Boot is the image's bootstrap, read-only and the caller's to close.
func (l *Lease) Boot() (*os.File, error) {
	if err := l.n.forgedIn(l.record); err != nil {
		return nil, err
	}
	return l.open.Boot()
}

// Share is segment k as another process may read it (store.Image.Share).
func (l *Lease) Share(k int) (*store.Share, error) {
	if err := l.n.forgedIn(l.record); err != nil {
		return nil, err
	}
	s, err := l.open.Share(k)
	if err != nil {
		return nil, err
	}
	if err := l.n.forgedIn(l.record); err != nil { // found just now: condemn may not have seen this share
		return nil, errors.Join(err, s.Close())
	}
	return s, nil
}
