package store_test

import (
	"context"
	"testing"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// Chunks are verified by the algorithm that their table names.
func TestAlgorithms(t *testing.T) {
	for name, a := range map[string]index.Algorithm{"sha256": index.SHA256, "blake3": index.BLAKE3} {
		t.Run(name, func(t *testing.T) {
			img := storetest.NewImage(name, storetest.Units(1, 2*miB).Summed(a))
			eachMode(t, func(t *testing.T, cfg store.Config) {
				bad, good := storetest.NewSource("bad", img), storetest.NewSource("good", img)
				bad.Fault = func(storetest.Request) storetest.Fault {
					return storetest.Fault{Corrupt: func(off int64) bool { return off%200_000 == 0 }}
				}
				s := open(t, cfg)
				sameAll(t, openImage(t, s, img, bad, good), img.Plain, 128*kiB)
				if s.Stats().VerifyFailures == 0 {
					t.Error("wrong bytes were not noticed")
				}
			})
		})
	}
}

// Bytes that no digest speaks of come from a source that vouches for them and
// from no other.
func TestVouched(t *testing.T) {
	img := storetest.NewImage("vouched", storetest.Units(1, 2*miB).Summed(index.Vouched))
	yes := func(index.ID) bool { return true }
	no := func(index.ID) bool { return false }
	source := func(label string) *storetest.Source { return storetest.NewSource(label, img) }
	cases := []struct {
		name  string
		knows func(index.ID) bool // nil: the source is no Voucher
		reads bool
	}{{"no voucher", nil, false}, {"does not vouch", no, false}, {"vouches", yes, true}}
	eachMode(t, func(t *testing.T, cfg store.Config) {
		for _, c := range cases {
			t.Run(c.name, func(t *testing.T) {
				cfg.Dir = t.TempDir()
				plain := source("plain")
				sources := []store.Source{plain}
				if c.knows != nil {
					sources = append(sources, storetest.Vouching{Source: source("voucher"), Knows: c.knows})
				}
				i := openImage(t, open(t, cfg), img, sources...)
				_, err := i.ReadAt(context.Background(), make([]byte, 4*kiB), firstChunk)
				if c.reads != (err == nil) || err != nil && !errdefs.IsUnavailable(err) {
					t.Fatalf("read: %v", err)
				}
				if c.reads {
					sameAll(t, i, img.Plain, 128*kiB)
				}
				if n := len(plain.Requests()); n > 0 {
					t.Errorf("a source that cannot vouch was asked %d times", n)
				}
			})
		}
	})
}

// Hints of what to prefetch are there after a restart, and newer ones replace
// them.
func TestHints(t *testing.T) {
	hinted := func(ranges ...index.Range) *storetest.Image {
		img := storetest.NewImage("hints", storetest.Solid(1, miB), storetest.Solid(2, miB))
		img.Index.Segments[1].Prefetch = ranges
		return img
	}
	cfg := store.Config{Dir: t.TempDir()}
	for _, want := range [][]index.Range{{{Off: 4096, Len: 9}, {Off: 0, Len: 1}}, {{Off: 1, Len: 2}}, nil} {
		img := hinted(want...)
		s := open(t, cfg)
		check(t, openImage(t, s, img).Close())
		check(t, s.Close())
		s = open(t, cfg)
		i, err := s.LoadImage(context.Background(), img.Index.Manifest, nil)
		check(t, err)
		got := i.Segments()
		if len(got[0].Prefetch) != 0 || len(got[1].Prefetch) != len(want) {
			t.Fatalf("hints %v, want %v", got[1].Prefetch, want)
		}
		for k := range want {
			if got[1].Prefetch[k] != want[k] {
				t.Errorf("hint %d is %v, want %v", k, got[1].Prefetch[k], want[k])
			}
		}
		check(t, i.Close())
		check(t, s.Close())
	}
}
