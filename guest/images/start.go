package images

import (
	"time"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/rootfs/index"
)

// Start is about what a container reads until it is ready. The zero value is of a node
// that keeps no such things.
type Start struct {
	Profile []index.Range // of the image file, in the order in which they will be wanted; not checked
	Budget  int64         // bytes of them that may be fetched and not yet read
	Record  time.Duration // how long it is to be noted what is read
}

// Bounds of what the node may ask for.
const (
	maxProfile = 16 << 10 // ranges
	maxRecord  = 10 * time.Minute
)

func startOf(resp *api.DescribeResponse) Start {
	s := Start{
		Budget: resp.ProfileBudget,
		Record: time.Duration(min(max(resp.RecordUs, 0), maxRecord.Microseconds())) * time.Microsecond,
	}
	for _, r := range resp.Profile[:min(len(resp.Profile), maxProfile)] {
		s.Profile = append(s.Profile, index.Range{Off: r.GetOffset(), Len: r.GetLength()})
	}
	return s
}
