package store

import (
	"slices"
	"testing"

	"github.com/tatami-containers/tatami/rootfs/index"
)

func TestMergeRuns(t *testing.T) {
	const kiB, miB = int64(1) << 10, int64(1) << 20
	for _, tc := range []struct {
		name   string
		ranges []index.Range
		want   []index.Range
	}{
		{name: "none"},
		{"far apart", []index.Range{{Off: miB, Len: 4 * kiB}, {Off: 0, Len: 8 * kiB}}, []index.Range{{Off: 0, Len: 8 * kiB}, {Off: miB, Len: 4 * kiB}}},
		{"neighbours", []index.Range{{Off: 64 * kiB, Len: 64 * kiB}, {Off: 0, Len: 64 * kiB}}, []index.Range{{Off: 0, Len: 128 * kiB}}},
		{"a gap", []index.Range{{Off: 0, Len: 64 * kiB}, {Off: 128 * kiB, Len: 64 * kiB}}, []index.Range{{Off: 0, Len: 192 * kiB}}},
		{"one in another", []index.Range{{Off: 0, Len: 64 * kiB}, {Off: 4 * kiB, Len: 4 * kiB}}, []index.Range{{Off: 0, Len: 64 * kiB}}},
		{"large", []index.Range{{Off: 8 * miB, Len: 5 * miB / 2}}, []index.Range{{Off: 8 * miB, Len: miB}, {Off: 9 * miB, Len: miB}, {Off: 10 * miB, Len: miB / 2}}},
		{"the order of what lies far apart in time", []index.Range{{Off: 8 * miB, Len: miB}, {Off: 0, Len: miB}, {Off: 4 * miB, Len: miB}},
			[]index.Range{{Off: 8 * miB, Len: miB}, {Off: 0, Len: miB}, {Off: 4 * miB, Len: miB}}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if got := mergeRuns(tc.ranges, miB); !slices.Equal(got, tc.want) {
				t.Errorf("%v, want %v", got, tc.want)
			}
		})
	}
}
