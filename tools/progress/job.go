package progress

import (
	"fmt"
	"strings"
	"sync/atomic"
	"time"
	"unicode/utf8"
)

// job is a line of a Display. All but done belongs to Display.mu.
type job struct {
	display *Display
	name    string
	total   int64 // bytes; -1 when not known
	done    atomic.Int64
	started time.Time
	ended   bool

	// At the last tick:
	seen int64
	at   time.Time
	rate float64 // bytes a second, smoothed; 0 is none yet
}

var _ Job = (*job)(nil)

func (j *job) Add(n int64) { j.done.Add(n) }

func (j *job) Done(note string) { j.display.end(j, note) }

// smooth is the weight of a new measurement of the rate after a second.
const smooth = 0.3

// measure updates the rate.
func (j *job) measure(now time.Time) {
	passed := now.Sub(j.at).Seconds()
	if passed <= 0 {
		return
	}
	done := j.done.Load()
	current := max(0, float64(done-j.seen)/passed)
	weight := min(1, smooth*passed)
	if j.rate == 0 {
		weight = 1
	}
	j.rate += weight * (current - j.rate)
	j.seen, j.at = done, now
}

const barWidth = 20 // characters between the brackets

// bar is the job's line on a terminal, at most width characters.
func (j *job) bar(width int) string {
	line := "  " + pad(j.name, nameWidth)
	done := j.done.Load()
	if j.total > 0 {
		full := int(min(max(0, done), j.total) * barWidth / j.total)
		line += " [" + strings.Repeat("#", full) + strings.Repeat("-", barWidth-full) + "]"
	}
	return cut(line+" "+j.figures(), width)
}

// nameWidth is the room for names, in characters.
const nameWidth = 26

// figures are bytes, rate and the time that is left.
func (j *job) figures() string {
	done := j.done.Load()
	s := Bytes(max(0, done))
	if j.total >= 0 {
		s += " of " + Bytes(j.total)
	}
	if j.rate > 0 {
		s += fmt.Sprintf("  %s/s", Bytes(int64(j.rate)))
		if left := float64(j.total - done); j.total >= 0 && left > 0 {
			s += "  " + duration(time.Duration(left/j.rate*float64(time.Second))) + " left"
		}
	}
	return s
}

// result is the line that stays when the job has ended.
func (j *job) result(note string, now time.Time) string {
	if note == "" {
		note = fmt.Sprintf("%s in %s", Bytes(j.done.Load()), duration(now.Sub(j.started)))
	}
	return pad(j.name, nameWidth) + " " + note
}

func pad(s string, width int) string {
	if n := utf8.RuneCountInString(s); n < width {
		return s + strings.Repeat(" ", width-n)
	}
	return s
}

// cut shortens s to width characters.
func cut(s string, width int) string {
	if utf8.RuneCountInString(s) <= width {
		return s
	}
	return string([]rune(s)[:width])
}
