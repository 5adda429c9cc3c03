package replace_test

import (
	"cmp"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/store/replace"
)

// cache is a store that is simulated: images are opened, read and closed one after
// the other, and what does not fit goes by high and low watermark. A unit of size is
// one extent.
type cache struct {
	clock   replace.Clock
	quota   int64
	plain   bool // least recently used instead
	now     uint32
	extents map[key]*replace.Extent
	used    int64
}

type key struct {
	image string
	n     int
}

const extent = 8 << 20

func newCache(extents int64, plain bool) *cache {
	return &cache{clock: replace.Clock{Capacity: extents * extent}, quota: extents * extent, plain: plain, extents: map[key]*replace.Extent{}}
}

// use reads extents of an image and returns how many of them were there.
func (c *cache) use(image string, batch bool, read []int) (hits int) {
	for _, n := range read {
		e := c.extents[key{image, n}]
		if e == nil {
			e = new(replace.Extent)
			c.extents[key{image, n}] = e
		}
		if e.Bytes > 0 {
			hits++
			continue
		}
		e.Bytes = extent
		c.used += extent
	}
	c.now++
	for _, n := range read {
		c.clock.Use(c.extents[key{image, n}], c.now, batch)
	}
	if c.used > c.quota/100*95 {
		c.makeRoom(c.used - c.quota/100*85)
	}
	return hits
}

func (c *cache) makeRoom(need int64) {
	var all []replace.Candidate[key]
	for k, e := range c.extents {
		if e.Bytes > 0 {
			all = append(all, replace.Candidate[key]{Extent: *e, Key: k})
		}
	}
	slices.SortFunc(all, func(a, b replace.Candidate[key]) int {
		return cmp.Or(cmp.Compare(a.Last, b.Last), cmp.Compare(a.Key.image, b.Key.image), cmp.Compare(a.Key.n, b.Key.n))
	})
	if !c.plain {
		all = replace.Pick(all, c.quota, 0, need)
	}
	for _, v := range all {
		if need <= 0 {
			return
		}
		e := c.extents[v.Key]
		need -= e.Bytes
		c.used -= e.Bytes
		c.clock.Evict(e)
	}
}

func extentsOf(rnd *rand.Rand, n int, share float64) []int {
	var out []int
	for i := range n {
		if rnd.Float64() < share {
			out = append(out, i)
		}
	}
	return out
}

// scan measures how much of online images is found: 20 images of 30 extents, used
// at random, the popular ones more often, in a cache of 1,000 extents; in the second
// half, between two uses, batch images of other bytes are read once each, three times
// the cache all together.
func scan(seed uint64, plain, told, with bool) (rate float64) {
	rnd := rand.New(rand.NewPCG(seed, 7))
	online := rand.New(rand.NewPCG(seed, 8)) // the same with and without
	c := newCache(1000, plain)
	hits, reads, batch := 0, 0, 0
	for n := range 200 {
		image := string(rune('a' + min(online.IntN(20), online.IntN(20))))
		read := extentsOf(online, 30, 0.9)
		got := c.use(image, false, read)
		if n < 100 {
			continue // warms up
		}
		hits, reads = hits+got, reads+len(read)
		for with && batch < 3000*(n-99)/100 {
			read := extentsOf(rnd, 60, 0.8)
			c.use("batch "+string(rune(batch)), told, read)
			batch += len(read)
		}
	}
	return 100 * float64(hits) / float64(reads)
}

// A batch scan of three times the cache costs the online images at most 5 points of
// their hit rate, whether or not somebody says that it is batch, while least
// recently used loses many times that.
func TestScan(t *testing.T) {
	for seed := range uint64(10) {
		quiet := scan(seed, false, false, false)
		told, untold := scan(seed, false, true, true), scan(seed, false, false, true)
		lru, lruQuiet := scan(seed, true, false, true), scan(seed, true, false, false)
		t.Logf("seed %d: %.1f %% without the scan, %.1f told, %.1f not told; least recently used %.1f and %.1f", seed, quiet, told, untold, lruQuiet, lru)
		if quiet-told > 5 || quiet-untold > 5 {
			t.Errorf("seed %d: the scan costs more than 5 points", seed)
		}
		if lruQuiet-lru < 10 {
			t.Errorf("seed %d: least recently used loses nothing: the scan is none", seed)
		}
	}
}

// A working set that is new while the scan runs gets protected, although the scan
// pushes it out between its first uses.
func TestComesBack(t *testing.T) {
	c := newCache(100, false)
	all := extentsOf(rand.New(rand.NewPCG(1, 1)), 20, 1)
	var hits int
	for n := range 6 {
		hits = c.use("service", false, all)
		c.use("scan "+string(rune('a'+n)), false, extentsOf(rand.New(rand.NewPCG(1, 1)), 90, 1))
	}
	if hits != len(all) {
		t.Errorf("%d of %d extents are there", hits, len(all))
	}
	// What comes back after everything has been pushed out several times is as new.
	e := replace.Extent{Bytes: extent}
	c.clock.Use(&e, 1, false)
	c.clock.Evict(&e)
	for range 101 {
		c.clock.Evict(&replace.Extent{Bytes: extent})
	}
	c.clock.Use(&e, 2, false)
	if e.Level != replace.Probation {
		t.Errorf("level %d after a long time", e.Level)
	}
}

func TestUse(t *testing.T) {
	c := replace.Clock{Capacity: 10 * extent}
	for _, tc := range []struct {
		name  string
		batch []bool
		level replace.Level
		last  uint32
	}{
		{"batch only", []bool{true, true, true}, replace.Spare, 3},
		{"one", []bool{false}, replace.Probation, 1},
		{"two", []bool{false, false}, replace.Protected, 2},
		{"three", []bool{false, false, false}, replace.Protected, 3},
		{"batch after one", []bool{false, true, true}, replace.Probation, 1},
		{"one after batch", []bool{true, true, false}, replace.Probation, 3},
	} {
		e := replace.Extent{Bytes: extent}
		for i, b := range tc.batch {
			c.Use(&e, uint32(i+1), b)
		}
		if e.Level != tc.level || e.Last != tc.last {
			t.Errorf("%s: %+v", tc.name, e)
		}
	}
}

// Protected extents take no more than their share, so that new ones have a chance.
func TestProtectedShare(t *testing.T) {
	var all []replace.Candidate[int]
	for i := range 95 {
		level := replace.Protected
		if i >= 90 {
			level = replace.Probation
		}
		all = append(all, replace.Candidate[int]{Extent: replace.Extent{Bytes: extent, Last: uint32(i + 1), Level: level}, Key: i})
	}
	var got []int
	for _, v := range replace.Pick(all, 100*extent, 10*extent, 22*extent) {
		got = append(got, v.Key)
	}
	want := make([]int, 20) // 90 protected, 80 less the 10 elsewhere may be: the oldest 20 go first
	for i := range want {
		want[i] = i
	}
	if want = append(want, 90, 91); !slices.Equal(got, want) {
		t.Errorf("picked %v, want %v", got, want)
	}
}
