package node

import (
	"container/list"
	"context"
	"sync"
	"sync/atomic"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// accessBytes bounds what the node keeps in memory to read layers out of their
// blobs. A plain layer takes 32 KiB for each checkpoint, so about a thirtieth
// of its unpacked size.
const accessBytes = 64 << 20

// accessCache keeps the layer indexes that were used last, without their
// entries. One is always kept, however large it is.
type accessCache struct {
	load  func(layerKey) (*index.Layer, error)
	loads flights[layerKey, *index.Layer]
	limit int64 // bytes

	mu    sync.Mutex
	order *list.List                 // of *cachedAccess, last used first; protected by mu
	byKey map[layerKey]*list.Element // protected by mu
	bytes int64                      // of all elements; protected by mu
}

type cachedAccess struct {
	key   layerKey
	layer *index.Layer
	bytes int64
}

func newAccessCache(ctx context.Context, limit int64, load func(layerKey) (*index.Layer, error)) *accessCache {
	c := &accessCache{load: load, limit: limit, order: list.New(), byKey: map[layerKey]*list.Element{}}
	c.loads.init(ctx)
	return c
}

// close waits for what is being read. Precondition: the cache's context has
// ended.
func (c *accessCache) close() { c.loads.close() }

// get returns the layer index of k, which has no entries.
func (c *accessCache) get(ctx context.Context, k layerKey) (*index.Layer, error) {
	if l := c.find(k); l != nil {
		return l, nil
	}
	l, _, err := c.loads.do(ctx, k, func(context.Context, *atomic.Int64) (*index.Layer, error) {
		l, err := c.load(k)
		if err != nil {
			return nil, err
		}
		l.Entries, l.Skeleton = nil, nil
		c.put(k, l)
		return l, nil
	}, nil)
	return l, err
}

func (c *accessCache) find(k layerKey) *index.Layer {
	c.mu.Lock()
	defer c.mu.Unlock()
	e, ok := c.byKey[k]
	if !ok {
		return nil
	}
	c.order.MoveToFront(e)
	return e.Value.(*cachedAccess).layer
}

func (c *accessCache) put(k layerKey, l *index.Layer) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if old, ok := c.byKey[k]; ok {
		c.drop(old)
	}
	a := &cachedAccess{key: k, layer: l, bytes: accessSize(l)}
	c.byKey[k] = c.order.PushFront(a)
	c.bytes += a.bytes
	for c.bytes > c.limit && c.order.Len() > 1 {
		c.drop(c.order.Back())
	}
}

// forget drops what is kept of k.
func (c *accessCache) forget(k layerKey) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if e, ok := c.byKey[k]; ok {
		c.drop(e)
	}
}

// Precondition: c.mu is held.
func (c *accessCache) drop(e *list.Element) {
	a := c.order.Remove(e).(*cachedAccess)
	delete(c.byKey, a.key)
	c.bytes -= a.bytes
}

// accessSize is about what a layer index without entries takes in memory.
func accessSize(l *index.Layer) int64 {
	const chunk, extent, checkpoint, piece, span = 48, 24, 40, 32, 48
	n := int64(len(l.Table.Chunks))*chunk + int64(len(l.Access.Extents))*extent + int64(len(l.Access.Pieces))*piece +
		int64(len(l.Access.Spans))*span
	for _, c := range l.Access.Checkpoints {
		n += checkpoint + int64(len(c.Window))
	}
	return n
}
