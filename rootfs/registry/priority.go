package registry

import (
	"context"
	"net/http"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// prioritise tells the server how urgent a request is (RFC 9218, section 4.1: urgency
// from 0 to 7, 3 when nothing is said), for relays and proxies between this machine and
// a registry. A request says it once: what becomes more urgent later is asked for
// anew, or waits.
func prioritise(ctx context.Context, h http.Header) {
	rank := sched.RankOf(ctx)
	if w := sched.From(ctx); w != nil {
		rank = max(rank, w.Standing().Rank)
	}
	switch rank {
	case sched.Prefetch:
		h.Set("Priority", "u=5")
	case sched.Background:
		h.Set("Priority", "u=7")
	}
}
