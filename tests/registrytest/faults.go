package registrytest

import (
	"net/http"
	"strings"
	"time"
)

// Effect is one thing that goes wrong with an answer.
type Effect func(*effects)

// effects are all that goes wrong with one answer.
type effects struct {
	status   int
	header   map[string]string
	delay    time.Duration
	stall    *stall
	truncate *int64
	reset    bool // truncate by a reset of the connection
	loop     bool
	short    int64
	extra    int64
	corrupt  []int64
	rate     int64
	noRange  bool
	chunked  bool
	shift    int64
}

type stall struct {
	after  int64
	length time.Duration
}

// Forever is longer than any test: a stall of this length ends with the
// request or the server.
const Forever = 24 * time.Hour

// Status answers with an HTTP status and headers ("Retry-After", "1").
func Status(status int, header ...string) Effect {
	return func(e *effects) {
		e.status, e.header = status, map[string]string{}
		for i := 0; i+1 < len(header); i += 2 {
			e.header[header[i]] = header[i+1]
		}
	}
}

// Delay waits before the header.
func Delay(d time.Duration) Effect { return func(e *effects) { e.delay = d } }

// Stall stops for d after n bytes of the body.
func Stall(n int64, d time.Duration) Effect {
	return func(e *effects) { e.stall = &stall{after: n, length: d} }
}

// Truncate breaks the connection after n bytes of the body.
func Truncate(n int64) Effect { return func(e *effects) { e.truncate = &n } }

// Reset breaks the connection after n bytes of the body as a peer that died
// does (RST), HTTP/1.1 only.
func Reset(n int64) Effect { return func(e *effects) { e.truncate, e.reset = &n, true } }

// Short leaves out the last n bytes of the body, which is else in order: it has
// no Content-Length, and ends as it should.
func Short(n int64) Effect { return func(e *effects) { e.short, e.chunked = n, true } }

// Extra sends n bytes more than the answer is to have, and a Content-Length that
// counts them.
func Extra(n int64) Effect { return func(e *effects) { e.extra = n } }

// Loop redirects to where the request went.
func Loop() Effect { return func(e *effects) { e.status, e.loop = http.StatusTemporaryRedirect, true } }

// Corrupt flips the bits of bytes, given by their offsets in the whole blob or
// manifest. Offsets that the answer does not cover do nothing.
func Corrupt(at ...int64) Effect { return func(e *effects) { e.corrupt = append(e.corrupt, at...) } }

// Slow sends the body with a number of bytes a second.
func Slow(rate int64) Effect { return func(e *effects) { e.rate = rate } }

// NoRange answers a Range header with 200 and the whole content.
func NoRange() Effect { return func(e *effects) { e.noRange = true } }

// Chunked leaves out the Content-Length.
func Chunked() Effect { return func(e *effects) { e.chunked = true } }

// ShiftRange adds n to the offsets of the Content-Range header.
func ShiftRange(n int64) Effect { return func(e *effects) { e.shift = n } }

type fault struct {
	match   func(*http.Request) bool
	left    int // answers still to spoil; negative is all
	effects []Effect
}

// Fault spoils the next count answers (all of them when count is 0) to
// requests with match in their path ("/blobs/", a digest, "" for any). The
// redirect target is meant as well; its paths start with "/storage/". It
// returns a function that ends the fault.
func (s *Server) Fault(match string, count int, effects ...Effect) (remove func()) {
	return s.FaultFunc(func(r *http.Request) bool { return strings.Contains(r.URL.Path, match) }, count, effects...)
}

// FaultFunc is Fault for the requests that match says. match is called with
// the server's lock held: one call at a time, and no call of the server's methods.
func (s *Server) FaultFunc(match func(*http.Request) bool, count int, effects ...Effect) (remove func()) {
	if count == 0 {
		count = -1
	}
	f := &fault{match: match, left: count, effects: effects}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, f)
	return func() {
		s.mu.Lock()
		defer s.mu.Unlock()
		f.left = 0
	}
}

// effects collects the faults that match r and counts them down.
func (s *Server) effects(r *http.Request) (e effects) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, f := range s.faults {
		if f.left == 0 || !f.match(r) {
			continue
		}
		if f.left > 0 {
			f.left--
		}
		for _, effect := range f.effects {
			effect(&e)
		}
	}
	return e
}
