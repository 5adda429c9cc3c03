package cli

import (
	"cmp"
	"fmt"
	"io"
	"time"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// printSchedule writes what classes there are, and for each queue what they got and
// wait for. A class that has never had anything of a queue is left out there.
func printSchedule(w io.Writer, s *api.ScheduleStatus) {
	if s == nil { // a tatami-host that does not say
		return
	}
	fmt.Fprintln(w, "\nCLASS\tSHARE\tFLOOR\tCEILING\tFILL\tCONTAINERS\tHITS\tMISSES\tMEAN WAIT\tPROMOTED")
	for _, c := range s.Classes {
		fmt.Fprintf(w, "%s\t%d (%.3g%%)\t%s\t%s\t%s\t%d\t%d\t%d\t%s\t%d\n", c.Name, c.Share, c.Percent,
			cmp.Or(c.Floor, "-"), cmp.Or(c.Ceiling, "-"), c.Fill, c.Containers, c.Hits, c.Misses, mean(c.WaitUs, c.Misses), c.Promoted)
	}
	if !s.Enabled {
		fmt.Fprintln(w, "classes do not count: [schedule] is off, first come is first served")
	}
	head := "\nQUEUE\tAT MOST\tCLASS\tNOW\tOF ALL\tSINCE START\tWAITING\tOLDEST\tWAITS\tMEAN WAIT\tPROMOTED\n"
	for _, q := range s.Queues {
		for _, c := range q.Classes {
			if c.Total == 0 && c.Waits == 0 {
				continue
			}
			fmt.Fprint(w, head)
			head = ""
			printClass(w, q, c)
		}
	}
}

func printClass(w io.Writer, q *api.QueueStatus, c *api.QueueClassStatus) {
	atMost, share := "-", "-"
	if q.Limit > 0 {
		atMost = speed(q, q.Limit)
	}
	if q.Rate > 0 {
		share = fmt.Sprintf("%.0f%%", 100*c.Rate/q.Rate)
	}
	total := mib(c.Total)
	if q.Turns {
		total = micros(c.Total).Round(time.Millisecond).String()
	}
	fmt.Fprintf(w, "%s\t%s\t%s\t%s\t%s\t%s\t%d+%d+%d\t%s\t%d\t%s\t%d\n",
		oneLine(q.Name), atMost, c.Class, speed(q, c.Rate), share, total,
		c.Demand, c.Prefetch, c.Background, micros(c.OldestUs), c.Waits, mean(c.WaitedUs, c.Waits), c.Promoted)
}

// speed is a rate of a queue: bytes a second, or turns at a time.
func speed(q *api.QueueStatus, rate float64) string {
	if q.Turns {
		return fmt.Sprintf("%.3g turns", rate)
	}
	return mib(int64(rate)) + "/s"
}

// mean is of n waits.
func mean(us, n int64) time.Duration { return micros(us / max(n, 1)) }

func micros(us int64) time.Duration { return time.Duration(us) * time.Microsecond }
