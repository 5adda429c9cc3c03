package passthrough

import (
	"fmt"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// reserve is how many descriptors a Budget leaves to the rest of the process, for
// requests that open a file for a moment (one each) and for everything else.
const reserve = 4096

// Budget bounds the descriptors that guests can make the process hold.
type Budget struct {
	max  int64
	used atomic.Int64
}

// NewBudget allows n descriptors.
func NewBudget(n int64) *Budget { return &Budget{max: n} }

// DefaultBudget allows what RLIMIT_NOFILE does, less a reserve, and those that the
// process has for other things.
func DefaultBudget(others int64) (*Budget, error) {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return nil, fmt.Errorf("limit of open files: %w", err)
	}
	n := int64(min(l.Cur, 1<<30))
	if n < 2*reserve+others {
		return nil, fmt.Errorf("%w: %d open files are allowed, at least %d are needed; raise the limit (RLIMIT_NOFILE)",
			errdefs.ErrFailedPrecondition, n, 2*reserve+others)
	}
	return NewBudget(n - reserve - others), nil
}

// take allows one more, or returns ENFILE.
func (b *Budget) take() error {
	if b.used.Add(1) > b.max {
		b.used.Add(-1)
		return unix.ENFILE
	}
	return nil
}

func (b *Budget) give(n int) { b.used.Add(int64(-n)) }
