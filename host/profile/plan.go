package profile

import (
	"cmp"
	"slices"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Windows of a plan: what comes first is wanted first, what comes later in large
// ranges.
const (
	firstWindow = 1 << 20
	maxWindow   = 16 << 20
)

// Plan makes large ranges of what Replay lists. Inside windows, which begin small and
// grow, it goes by place, and ranges with at most gap bytes between them become one.
// Ranges of different windows may overlap where there are gaps.
func Plan(ranges []Range, gap int64) []Range {
	var out []Range
	for size := int64(firstWindow); len(ranges) > 0; size = min(2*size, maxWindow) {
		n := window(ranges, size)
		out = append(out, merge(slices.Clone(ranges[:n]), gap)...)
		ranges = ranges[n:]
	}
	return out
}

// window is how many of the ranges have size bytes together, at least one.
func window(ranges []Range, size int64) int {
	for i, r := range ranges {
		if size -= r.Len; size < 0 {
			return max(i, 1)
		}
	}
	return len(ranges)
}

// merge sorts ranges by place, in the order in which their segments come first, and
// joins neighbours.
func merge(ranges []Range, gap int64) []Range {
	order := map[index.ID]int{}
	for i, r := range ranges {
		if _, ok := order[r.Segment]; !ok {
			order[r.Segment] = i
		}
	}
	slices.SortFunc(ranges, func(a, b Range) int {
		return cmp.Or(cmp.Compare(order[a.Segment], order[b.Segment]), cmp.Compare(a.Off, b.Off))
	})
	out := ranges[:0]
	for _, r := range ranges {
		if n := len(out); n > 0 && out[n-1].Segment == r.Segment && r.Off-out[n-1].End() <= gap {
			out[n-1].Len = max(out[n-1].End(), r.End()) - out[n-1].Off
			continue
		}
		out = append(out, r)
	}
	return out
}
