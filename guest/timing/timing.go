// Package timing records the phases of a start, which the answer to Mount and
// one log line carry.
package timing

import (
	"log/slog"
	"sync"
	"time"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// Phases are the steps of one call, some of which run at the same time. A nil
// *Phases records nothing.
type Phases struct {
	start time.Time

	mu   sync.Mutex
	list []*api.Phase // protected by mu; in order of their ends
}

// Start begins a call.
func Start() *Phases { return &Phases{start: time.Now()} }

// Begin begins a phase and returns what ends it.
func (p *Phases) Begin(name string) (end func()) {
	if p == nil {
		return func() {}
	}
	from := time.Now()
	return func() {
		phase := &api.Phase{
			Name:       name,
			StartUs:    from.Sub(p.start).Microseconds(),
			DurationUs: time.Since(from).Microseconds(),
		}
		p.mu.Lock()
		defer p.mu.Unlock()
		p.list = append(p.list, phase)
	}
}

// List returns the phases that have ended.
func (p *Phases) List() []*api.Phase {
	p.mu.Lock()
	defer p.mu.Unlock()
	return append([]*api.Phase(nil), p.list...)
}

// LogValue shows every phase with its duration.
func (p *Phases) LogValue() slog.Value {
	attrs := []slog.Attr{slog.String("total", time.Since(p.start).Round(time.Microsecond).String())}
	for _, ph := range p.List() {
		attrs = append(attrs, slog.String(ph.Name, (time.Duration(ph.DurationUs)*time.Microsecond).String()))
	}
	return slog.GroupValue(attrs...)
}
