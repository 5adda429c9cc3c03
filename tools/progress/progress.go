// Package progress shows how far long work is: one line for each job that is
// redrawn on a terminal, plain lines every few seconds elsewhere.
package progress

import (
	"fmt"
	"time"
)

// Reporter hears of jobs. Its methods and those of its jobs may be called at
// the same time.
type Reporter interface {
	// Start begins a job of total bytes, or -1 when that is not known.
	Start(name string, total int64) Job
}

// Job is one piece of work.
type Job interface {
	// Add tells of n more bytes; n is negative when work has to be done again.
	Add(n int64)
	// Done ends the job. The note says how: "" for as planned.
	Done(note string)
}

// None is a Reporter that shows nothing.
var None Reporter = none{}

type none struct{}

func (none) Start(string, int64) Job { return none{} }
func (none) Add(int64)               {}
func (none) Done(string)             {}

// Bytes writes a size in the unit that suits it, powers of 1000.
func Bytes(n int64) string {
	switch {
	case n >= 1e9:
		return fmt.Sprintf("%.2f GB", float64(n)/1e9)
	case n >= 1e6:
		return fmt.Sprintf("%.1f MB", float64(n)/1e6)
	case n >= 1e3:
		return fmt.Sprintf("%.1f kB", float64(n)/1e3)
	}
	return fmt.Sprintf("%d B", n)
}

// duration writes a time to wait for in whole seconds.
func duration(d time.Duration) string {
	d = d.Round(time.Second)
	if d >= time.Hour {
		return fmt.Sprintf("%dh%02dm", d/time.Hour, d%time.Hour/time.Minute)
	}
	if d >= time.Minute {
		return fmt.Sprintf("%dm%02ds", d/time.Minute, d%time.Minute/time.Second)
	}
	return fmt.Sprintf("%ds", d/time.Second)
}
