package profile

import (
	"fmt"
	"math"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
)

var segment = digest.FromString("segment")

// at is the k-th chunk of a segment, of 64 KiB.
func at(k int) Range { return Range{segment, int64(k) << 16, 1 << 16} }

func ats(k ...int) []Range {
	var out []Range
	for _, k := range k {
		out = append(out, at(k))
	}
	return out
}

// merged are runs added to an empty profile.
func merged(runs ...[]Range) *Profile {
	p := &Profile{Source: Recorded}
	for _, r := range runs {
		p.Add(r, maxBytes, false)
	}
	return p
}

func repeat(n int, run []Range) [][]Range { return slices.Repeat([][]Range{run}, n) }

func TestAdd(t *testing.T) {
	for name, tc := range map[string]struct {
		runs [][]Range
		want []Range
	}{
		"one":                      {[][]Range{ats(3, 1, 2)}, ats(3, 1, 2)},
		"the same again":           {repeat(20, ats(3, 1, 2)), ats(3, 1, 2)},
		"mean place":               {[][]Range{ats(1, 2, 3), ats(1, 3, 2), ats(1, 3, 2)}, ats(1, 3, 2)},
		"one of four":              {append(repeat(3, ats(1)), ats(1, 9)), ats(1, 9)},
		"one of five":              {append(repeat(4, ats(1)), ats(1, 9)), ats(1)},
		"two of nine":              {append(repeat(7, ats(1)), ats(1, 9), ats(1, 9)), ats(1, 9)},
		"what is read no more":     {append([][]Range{ats(7, 1)}, repeat(8, ats(1))...), ats(1)},
		"nothing read says little": {[][]Range{ats(1), nil, nil, nil, nil, nil, nil}, ats(1)},
	} {
		if got := merged(tc.runs...).Replay(); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}

// Of a start of which part was not seen, what was seen counts, and what was not does
// not count against anything.
func TestAddPartial(t *testing.T) {
	p := merged(ats(1, 2))
	for range 30 {
		p.Add(ats(9), maxBytes, true)
	}
	if got := p.Replay(); p.Runs != 1 || !slices.Equal(got, ats(9, 1, 2)) && !slices.Equal(got, ats(1, 9, 2)) {
		t.Errorf("%d runs: %v", p.Runs, got)
	}
}

// A profile stays within its bounds whatever guests say, and what many starts read is
// not displaced by what one did.
func TestBounds(t *testing.T) {
	rnd := rand.New(rand.NewPCG(1, 2))
	good := ats(1, 2, 3)
	p := merged(repeat(3, good)...)
	const limit = 200 << 16
	for range 5 {
		var bad []Range
		for range 3 * MaxParts {
			bad = append(bad, at(100+rnd.IntN(1<<20)))
		}
		p.Add(append(bad, good...), limit, false)
		if n := Bytes(p.Replay()); len(p.Parts) > MaxParts || n > limit {
			t.Fatalf("%d parts, %d bytes", len(p.Parts), n)
		}
	}
	replay := p.Replay()
	for _, r := range good {
		if !slices.Contains(replay, r) {
			t.Errorf("%v was displaced", r)
		}
	}
	for image, want := range map[int64]int64{1: minBytes, 100 << 20: 50 << 20, 1 << 40: maxBytes} {
		if got := MaxBytes(image); got != want {
			t.Errorf("of an image of %d bytes: %d, want %d", image, got, want)
		}
	}
}

// However runs are, all that is replayed was read by a quarter of the last eight, and
// all that these read is replayed.
func TestAddRandom(t *testing.T) {
	for seed := range uint64(300) {
		rnd := rand.New(rand.NewPCG(seed, 0))
		var runs [][]Range
		p := &Profile{}
		for range 1 + rnd.IntN(20) {
			var run []Range
			for _, k := range rnd.Perm(12)[:1+rnd.IntN(11)] {
				run = append(run, at(k))
			}
			runs = append(runs, run)
			p.Add(run, maxBytes, false)
		}
		last := runs[max(0, len(runs)-history):]
		got := p.Replay()
		for k := range 12 {
			n := 0
			for _, run := range last {
				if slices.Contains(run, at(k)) {
					n++
				}
			}
			if want := n > 0 && 4*n >= len(last); want != slices.Contains(got, at(k)) {
				t.Fatalf("seed %d: chunk %d is in %d of the last %d of %d runs, replayed: %v", seed, k, n, len(last), len(runs), !want)
			}
		}
	}
}

func TestKey(t *testing.T) {
	seen := map[string]bool{}
	for _, args := range [][]string{nil, {"a", "b"}, {"a b"}, {"ab"}, {"a"}, {"\xff\x00/../x"}} {
		k := Key(args)
		if seen[k] || !validKey(k) || (k == "") != (args == nil) {
			t.Errorf("%q: %q", args, k)
		}
		seen[k] = true
	}
	for _, k := range []string{"x", "../..", "0123456789ABCDEF", "0123456789abcde", "0123456789abcdef00"} {
		if validKey(k) {
			t.Errorf("%q may be a key", k)
		}
	}
	for in, want := range map[string]string{"/bin/sh": "/bin/sh", "a\nb\x1b[2J": "a?b?[2J", "\xff": "?"} {
		if got := Command([]string{in, "--password=secret"}); got != want {
			t.Errorf("%q is shown as %q, want %q", in, got, want)
		}
	}
}

func TestPlan(t *testing.T) {
	other := Range{digest.FromString("other"), 0, 100}
	for name, tc := range map[string]struct {
		in   []Range
		gap  int64
		want []Range
	}{
		"none":            {nil, 0, nil},
		"neighbours":      {ats(2, 1, 3), 0, []Range{{segment, 1 << 16, 3 << 16}}},
		"a gap":           {ats(1, 3), 1 << 16, []Range{{segment, 1 << 16, 3 << 16}}},
		"too large a gap": {ats(3, 1), 1<<16 - 1, ats(1, 3)},
		"two segments":    {[]Range{at(5), other, at(4)}, 0, []Range{{segment, 4 << 16, 2 << 16}, other}},
	} {
		if got := Plan(tc.in, tc.gap); !slices.Equal(got, tc.want) {
			t.Errorf("%s: %v, want %v", name, got, tc.want)
		}
	}
}

// A plan has all that it was made of, about in its order, and without gaps nothing
// else and nothing twice.
func TestPlanRandom(t *testing.T) {
	for seed := range uint64(50) {
		rnd := rand.New(rand.NewPCG(seed, 1))
		in := ats(rnd.Perm(2000)[:1000]...)
		got := Plan(in, 0)
		if Bytes(got) != Bytes(in) {
			t.Fatalf("seed %d: %d bytes of %d", seed, Bytes(got), Bytes(in))
		}
		for i, r := range in {
			k := slices.IndexFunc(got, func(g Range) bool { return g.Segment == r.Segment && g.Off <= r.Off && g.End() >= r.End() })
			if k < 0 {
				t.Fatalf("seed %d: %v is missing", seed, r)
			}
			if before := Bytes(got[:k]); i < 16 && before > firstWindow {
				t.Errorf("seed %d: %d bytes before the part that comes as number %d", seed, before, i)
			}
		}
		if joined := Plan(in, 4<<16); 4*len(joined) > 3*len(got) || Bytes(joined) < Bytes(in) {
			t.Errorf("seed %d: %d ranges with gaps, %d without", seed, len(joined), len(got))
		}
	}
}

// Files are found by their paths and by their bytes.
func TestTree(t *testing.T) {
	const block = index.BlockSize
	low, high := digest.FromString("low"), digest.FromString("high")
	tree := NewTree([]Layer{
		{low, []index.Entry{
			{Path: "bin", Kind: index.Symlink, Link: "usr/bin"},
			{Path: "usr/bin/sh", Kind: index.Symlink, Link: "dash"},
			{Path: "usr/bin/dash", Kind: index.File, Size: 100, Off: 0},
			{Path: "usr/bin/ash", Kind: index.Hardlink, Link: "usr/bin/dash"},
			{Path: "etc/x", Kind: index.File, Size: 5 * block, Off: block},
			{Path: "loop", Kind: index.Symlink, Link: "/loop"},
			{Path: "self", Kind: index.Hardlink, Link: "self"},
			{Path: "out", Kind: index.Symlink, Link: "../../../../etc/x"},
			{Path: "empty", Kind: index.File},
			{Path: "dir", Kind: index.Dir},
		}},
		{high, []index.Entry{
			{Path: "etc/x", Kind: index.File, Size: 7, Off: 2 * block},
			{Path: "a", Kind: index.File, Size: 9, Off: 0},
			{Path: "gone", Kind: index.Whiteout},
		}},
	})
	dash, x, a := Range{low, 0, 100}, Range{high, 2 * block, 7}, Range{high, 0, 9}
	for _, tc := range []struct {
		paths   []string
		want    []Range
		unknown int
	}{
		{[]string{"usr/bin/dash"}, []Range{dash}, 0},
		{[]string{"bin/sh", "usr/bin/ash", "bin/dash"}, []Range{dash}, 0},
		{[]string{"a", "etc/x", "out"}, []Range{a, x}, 0},
		{[]string{"loop", "self", "dir", "none", "gone", "etc/x/y", ""}, nil, 7},
		{[]string{"empty", "a"}, []Range{a}, 0},
	} {
		got, unknown := tree.Find(tc.paths)
		if !slices.Equal(got, tc.want) || unknown != tc.unknown {
			t.Errorf("%q: %v and %d unknown, want %v and %d", tc.paths, got, unknown, tc.want, tc.unknown)
		}
	}
	paths := tree.Paths([]Range{{low, 3 * block, 1}, a, {low, 0, 3 * block}, {high, block, block}, {digest.FromString("none"), 0, 1}})
	if want := []string{"etc/x", "a", "usr/bin/dash"}; !slices.Equal(paths, want) {
		t.Errorf("paths %q, want %q", paths, want)
	}
}

func TestLinkChain(t *testing.T) {
	var entries []index.Entry
	for i := range 50 {
		entries = append(entries, index.Entry{Path: fmt.Sprint("l", i), Kind: index.Symlink, Link: fmt.Sprint("l", i+1)})
	}
	entries = append(entries, index.Entry{Path: "l50", Kind: index.File, Size: 1})
	tree := NewTree([]Layer{{segment, entries}})
	for name, want := range map[string]int{"l10": 0, "l9": 1} {
		if _, unknown := tree.Find([]string{name}); unknown != want {
			t.Errorf("%s: %d unknown, want %d", name, unknown, want)
		}
	}
}

// Links that lead through ever more directories keep nobody busy.
func TestLongWay(t *testing.T) {
	var entries []index.Entry
	for i := range maxLinks {
		entries = append(entries, index.Entry{Path: fmt.Sprint("l", i), Kind: index.Symlink, Link: fmt.Sprint("l", i+1, "/", strings.Repeat("a/", 1<<10))})
	}
	tree := NewTree([]Layer{{digest.FromString("x"), entries}})
	const left = 1 << 20
	walked := maxWalked - left
	for range 2 {
		if _, ok := tree.resolve("l0/x", &walked); ok || walked < maxWalked || walked > maxWalked+left {
			t.Errorf("found %v after %d bytes", ok, walked)
		}
	}
}

// What is shown of a long command in letters of several bytes is kept, too.
func TestCommandCut(t *testing.T) {
	for n := range 3 {
		p := &Profile{Source: Recorded, Runs: math.MaxInt32, Command: Command([]string{strings.Repeat("x", n) + strings.Repeat("€", maxCommand)})}
		p.Add([]Range{{digest.FromString("x"), 0, 1}}, 1, false)
		data, err := Encode(p)
		if err == nil {
			_, err = Decode(data)
		}
		if err != nil || len(p.Command) > maxCommand {
			t.Errorf("%q: %v", p.Command, err)
		}
	}
}
