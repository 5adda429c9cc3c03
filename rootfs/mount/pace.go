package mount

import "time"

// How long who watches the mount table waits after a change: containers come and go
// with several mounts each. Reading the table takes time with each of its mounts, and on
// a node where many containers come and go it changes all the time; so the wait is at
// least paceRatio times what the last look took, but somebody waits for what is freed.
const (
	settle    = 50 * time.Millisecond
	settleMax = time.Second
	paceRatio = 20
)

// Pace keeps looks at the mount table to a small share of the time. It is for one
// goroutine; the zero value is one before the first look.
type Pace struct {
	took time.Duration // of the last look
}

// Wait is how long to wait between a change and the look at it.
func (p *Pace) Wait() time.Duration {
	return min(max(settle, paceRatio*p.took), settleMax)
}

// Time notes how long a look takes.
func (p *Pace) Time(look func()) {
	from := time.Now()
	look()
	p.took = time.Since(from)
}
