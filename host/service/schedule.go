package service

import (
	"fmt"
	"strconv"
	"strings"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/rootfs/sched"
	"github.com/tatami-containers/tatami/rootfs/store"
)

// schedule is what the status says of classes and queues.
func (s *Service) schedule() *api.ScheduleStatus {
	out := &api.ScheduleStatus{Enabled: s.cfg.Sched != nil && !s.cfg.Schedule.Off}
	all, containers, reads := 0, s.containersOf(), s.cfg.Node.Stats().Store.Classes
	for _, c := range s.cfg.Schedule.Classes {
		all += c.Share
	}
	for _, c := range s.cfg.Schedule.Classes {
		out.Classes = append(out.Classes, &api.ClassStatus{
			Name: c.Name, Share: int64(c.Share), Percent: 100 * float64(c.Share) / float64(all),
			Floor: rate(c.Floor), Ceiling: rate(c.Ceiling), Fill: fill(c.Fill), Containers: containers[c.Name],
		})
		addReads(out.Classes[len(out.Classes)-1], reads)
	}
	for _, q := range s.cfg.Sched.Status().Queues {
		out.Queues = append(out.Queues, queueStatus(q))
	}
	return out
}

// addReads adds what the reads of the class's containers found.
func addReads(out *api.ClassStatus, all []store.ClassStats) {
	for _, c := range all {
		if c.Class != out.Name {
			continue
		}
		out.Hits = c.Hits
		for _, r := range c.Ranks {
			out.Misses += r.Misses
			out.WaitUs += r.Wait.Microseconds()
			out.Promoted += r.Promoted
		}
	}
}

// queueStatus makes a message, which has no room for a name that is no text: that of a
// host comes from a redirect.
func queueStatus(q sched.QueueStatus) *api.QueueStatus {
	out := &api.QueueStatus{Name: strings.ToValidUTF8(q.Name, "?"), Turns: q.Turns, Rate: q.Rate, Limit: q.Limit}
	for _, c := range q.Classes {
		out.Classes = append(out.Classes, &api.QueueClassStatus{
			Class:  c.Class,
			Demand: int64(c.Waiting[sched.Demand]), Prefetch: int64(c.Waiting[sched.Prefetch]), Background: int64(c.Waiting[sched.Background]),
			OldestUs: c.Oldest.Microseconds(), Total: c.Total, Rate: c.Rate,
			Waits: c.Waits, WaitedUs: c.Waited.Microseconds(), Promoted: c.Promoted,
		})
	}
	return out
}

// rate is a part of the link in words; "" is none.
func rate(r sched.Rate) string {
	switch {
	case r.Percent > 0:
		return strconv.FormatFloat(r.Percent, 'f', -1, 64) + "%"
	case r.Bytes > 0:
		return fmt.Sprintf("%.6g MB/s", float64(r.Bytes)/1e6)
	}
	return ""
}

func fill(all bool) string {
	if all {
		return "full"
	}
	return "none"
}

// containersOf counts the containers of each class.
func (s *Service) containersOf() map[string]int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	out := map[string]int64{}
	for _, box := range s.sandboxes {
		if box != nil {
			box.count(out)
		}
	}
	return out
}

// count adds the containers of the sandbox to those of each class.
func (b *sandbox) count(out map[string]int64) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, c := range b.containers {
		out[c.class.Class]++
	}
}
