package progress

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	redrawEvery  = 200 * time.Millisecond // on a terminal
	plainEvery   = 5 * time.Second        // elsewhere
	maxLines     = 12                     // of jobs that are redrawn; more are counted only
	defaultWidth = 80                     // characters of a terminal that does not tell
)

// Display is a Reporter that writes to a terminal or a log. Close ends it.
type Display struct {
	w     io.Writer
	width func() int // of the terminal in characters; nil when w is none
	now   func() time.Time

	mu    sync.Mutex
	jobs  []*job    // under way, in the order of their starts; protected by mu
	drawn int       // lines below the cursor's home; protected by mu
	last  time.Time // plain lines were written; protected by mu

	stop chan struct{}
	done sync.WaitGroup
}

var _ Reporter = (*Display)(nil)

// New returns a Display on w, which draws until Close is called.
func New(w io.Writer) *Display {
	d := newDisplay(w, terminalWidth(w), time.Now)
	d.done.Go(d.loop)
	return d
}

func newDisplay(w io.Writer, width func() int, now func() time.Time) *Display {
	return &Display{w: w, width: width, now: now, last: now(), stop: make(chan struct{})}
}

// terminalWidth is nil when w is no terminal.
func terminalWidth(w io.Writer) func() int {
	f, ok := w.(*os.File)
	if !ok {
		return nil
	}
	size := func() (*unix.Winsize, error) { return unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ) }
	if _, err := size(); err != nil {
		return nil
	}
	return func() int {
		if s, err := size(); err == nil && s.Col > 0 {
			return int(s.Col)
		}
		return defaultWidth
	}
}

// Close removes the lines of jobs that have not ended, and stops drawing.
func (d *Display) Close() {
	close(d.stop)
	d.done.Wait()
	d.mu.Lock()
	defer d.mu.Unlock()
	d.jobs = nil
	d.redraw("")
}

func (d *Display) loop() {
	t := time.NewTicker(redrawEvery)
	defer t.Stop()
	for {
		select {
		case <-d.stop:
			return
		case <-t.C:
			d.tick()
		}
	}
}

// Start implements Reporter.
func (d *Display) Start(name string, total int64) Job {
	now := d.now()
	j := &job{display: d, name: name, total: total, started: now, at: now}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.jobs = append(d.jobs, j)
	return j
}

// end writes the last line of a job, which stays.
func (d *Display) end(j *job, note string) {
	d.mu.Lock()
	defer d.mu.Unlock()
	if j.ended {
		return
	}
	j.ended = true
	d.jobs = slices.DeleteFunc(d.jobs, func(other *job) bool { return other == j })
	line := j.result(note, d.now()) + "\n"
	if d.width == nil {
		_, _ = io.WriteString(d.w, line) // nobody to tell
		return
	}
	d.redraw(line)
}

// tick measures rates and draws.
func (d *Display) tick() {
	d.mu.Lock()
	defer d.mu.Unlock()
	now := d.now()
	if d.width != nil {
		d.measure(now)
		d.redraw("")
		return
	}
	if now.Sub(d.last) < plainEvery {
		return
	}
	d.last = now
	d.measure(now)
	for _, j := range d.jobs {
		fmt.Fprintf(d.w, "%s %s\n", pad(j.name, nameWidth), j.figures())
	}
}

// measure updates the rates. Precondition: d.mu is held.
func (d *Display) measure(now time.Time) {
	for _, j := range d.jobs {
		j.measure(now)
	}
}

// Of ECMA-48: CUU moves up, ED erases to the end of the screen.
const (
	up    = "\x1b[%dA"
	erase = "\x1b[J"
)

// redraw puts stay, which may be "", in the place of the lines that were
// drawn, and the jobs' lines below it. Precondition: d.mu is held.
func (d *Display) redraw(stay string) {
	if d.width == nil {
		return
	}
	var b strings.Builder
	if d.drawn > 0 {
		fmt.Fprintf(&b, "\r"+up+erase, d.drawn)
	}
	b.WriteString(stay)
	width := d.width() - 1 // a full line would wrap
	shown := d.jobs[:min(len(d.jobs), maxLines)]
	for _, j := range shown {
		b.WriteString(j.bar(width) + "\n")
	}
	d.drawn = len(shown)
	if more := len(d.jobs) - len(shown); more > 0 {
		fmt.Fprintf(&b, "  and %d more\n", more)
		d.drawn++
	}
	_, _ = io.WriteString(d.w, b.String()) // nobody to tell
}
