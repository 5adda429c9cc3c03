package store

import (
	"encoding/binary"
	"sync"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// known says where chunks are that some segment of the store has in its own
// file. It is only a hint: whoever follows it compares sum and length in the
// table that it leads to, and the bytes with the sum. An entry takes about 26
// bytes: 8 of the sum and a place, in a Go map.
type known struct {
	limit int // entries; 0: it never knows anything

	mu      sync.Mutex
	places  map[uint64]place    // by the sum's first bytes; protected by mu, as all below
	ids     []index.ID          // segments by number
	numbers map[index.ID]uint32 // the other way round
}

type place struct{ seg, chunk uint32 }

// minShared is the least length of a chunk that is looked for, in bytes: less
// than a block saves no disk.
const minShared = index.BlockSize

func newKnown(limit int) *known {
	return &known{limit: limit, places: map[uint64]place{}, numbers: map[index.ID]uint32{}}
}

// sharable says whether chunk i of t may be read from another segment. Vouched
// sums are not: nothing could compare the other's bytes with them.
func sharable(t *index.Table, i int) bool {
	return t.Chunks[i].Len >= minShared && t.Algorithm != index.Vouched
}

func keyOf(t *index.Table, i int) uint64 { return binary.LittleEndian.Uint64(t.Chunks[i].Sum[:]) }

// full says that there is no room for more.
func (k *known) full() bool {
	k.mu.Lock()
	defer k.mu.Unlock()
	return len(k.places) >= k.limit
}

// add enters chunk i of segment id unless the same chunk is known elsewhere or
// there is no room.
func (k *known) add(id index.ID, t *index.Table, i int) {
	if k.limit == 0 || !sharable(t, i) {
		return
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	key := keyOf(t, i)
	if _, ok := k.places[key]; ok || len(k.places) >= k.limit {
		return
	}
	n, ok := k.numbers[id]
	if !ok {
		n = uint32(len(k.ids))
		k.ids, k.numbers[id] = append(k.ids, id), n
	}
	k.places[key] = place{seg: n, chunk: uint32(i)}
}

// find says where chunk i of segment id is besides there.
func (k *known) find(id index.ID, t *index.Table, i int) (other index.ID, chunk int, ok bool) {
	if k.limit == 0 || !sharable(t, i) {
		return "", 0, false
	}
	k.mu.Lock()
	defer k.mu.Unlock()
	p, ok := k.places[keyOf(t, i)]
	if !ok || k.ids[p.seg] == id && int(p.chunk) == i {
		return "", 0, false
	}
	return k.ids[p.seg], int(p.chunk), true
}

// forget removes chunk i of segment id, which has the table t, if that is where
// the chunk is known to be.
func (k *known) forget(id index.ID, t *index.Table, i int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	n, ok := k.numbers[id]
	if key := keyOf(t, i); ok && k.places[key] == (place{seg: n, chunk: uint32(i)}) {
		delete(k.places, key)
	}
}

// forgetAt removes the place that chunk i of t was found at, id and chunk j.
func (k *known) forgetAt(t *index.Table, i int, id index.ID, j int) {
	k.mu.Lock()
	defer k.mu.Unlock()
	if key := keyOf(t, i); k.places[key] == (place{seg: k.numbers[id], chunk: uint32(j)}) {
		delete(k.places, key)
	}
}
