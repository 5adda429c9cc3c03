package ociserve

import (
	"net/http"
	"strings"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// rankOf is how urgent a client says that its request is: the urgency, u, of the
// Priority header (RFC 9218, section 4.1), which is a dictionary of structured fields
// (RFC 8941). As that RFC wants it, what is no urgency counts as none, which is 3.
func rankOf(h http.Header) sched.Rank {
	rank := sched.Demand
	for _, line := range h.Values("Priority") {
		for member := range strings.SplitSeq(line, ",") {
			if u, ok := urgency(member); ok { // the last one counts
				rank = u
			}
		}
	}
	return rank
}

func urgency(member string) (sched.Rank, bool) {
	value, ok := strings.CutPrefix(strings.Trim(member, " \t"), "u=")
	value, _, _ = strings.Cut(value, ";") // parameters
	if !ok || len(value) != 1 || value[0] < '0' || value[0] > '7' {
		return 0, false
	}
	switch {
	case value <= "3":
		return sched.Demand, true
	case value <= "5":
		return sched.Prefetch, true
	}
	return sched.Background, true
}
