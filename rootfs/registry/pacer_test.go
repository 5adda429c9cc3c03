package registry

import (
	"context"
	"errors"
	"io"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/containerd/errdefs"
)

// TestPacer takes one pacer through refusals and answers.
func TestPacer(t *testing.T) {
	start := time.Unix(1000, 0)
	at := func(d time.Duration) time.Time { return start.Add(d) }
	var p pacer
	for i := range 32 {
		if got := p.reserve(at(time.Duration(i))); got != at(time.Duration(i)) {
			t.Fatalf("request %d waits until %v although nothing was refused", i, got.Sub(start))
		}
	}
	// All of them are refused: one pause, and one cut of the rate.
	for i := range 32 {
		p.refuse(at(time.Second/2), at(time.Duration(i)), -1, time.Second)
	}
	if p.row != 1 || p.rate != 16 || !p.until.Equal(at(3*time.Second/2)) {
		t.Errorf("after a burst: %d pauses, %v requests a second, until %v", p.row, p.rate, p.until.Sub(start))
	}
	// A late one of the burst knows how long it takes.
	p.refuse(at(time.Second), at(40), 2*time.Second, 2*time.Second)
	if p.row != 1 || !p.until.Equal(at(3*time.Second)) {
		t.Errorf("after a late refusal: %d pauses, until %v", p.row, p.until.Sub(start))
	}
	// Who reserved before the pause asks again; then one follows the other.
	if !p.stale(at(time.Second)) {
		t.Error("a time in the pause is good")
	}
	for i, want := range []time.Duration{0, 62500 * time.Microsecond, 125 * time.Millisecond} {
		if got := p.reserve(at(time.Second)); !got.Equal(at(3*time.Second + want)) {
			t.Errorf("request %d goes at %v", i, got.Sub(start))
		}
	}
	// Answers to what was sent before the pause say nothing, others raise the rate.
	p.answer(at(10))
	if p.row != 1 || p.rate != 16 {
		t.Errorf("an old answer: %d pauses, %v requests a second", p.row, p.rate)
	}
	p.answer(at(3 * time.Second))
	if p.row != 0 || p.rate != 20 || !p.refusing(at(4*time.Second)) {
		t.Errorf("an answer: %d pauses, %v requests a second", p.row, p.rate)
	}
	for range 12 {
		p.answer(at(4 * time.Second))
	}
	if p.rate != 0 || p.refusing(at(4*time.Second)) {
		t.Errorf("after many answers still %v requests a second", p.rate)
	}
	// Refusals in a row lead to minRate, and time heals.
	for i := range 10 {
		now := at(time.Duration(10+i) * time.Second)
		p.refuse(now, now, -1, 0)
	}
	if p.rate != minRate || p.row != 10 {
		t.Errorf("%v requests a second after %d refusals", p.rate, p.row)
	}
	late := at(19*time.Second + refusalAge + 1)
	if got := p.reserve(late); got != late || p.refusing(late) {
		t.Errorf("refusals are remembered for ever")
	}
}

// limited is a host that takes so many requests in each second and refuses the
// others, and all until a time.
type limited struct {
	rate   int
	closed time.Time
	header string // Retry-After of refusals, or ""

	mu      sync.Mutex
	second  int64
	taken   int
	refused []time.Time
}

func (l *limited) CloseIdleConnections() {}

func (l *limited) RoundTrip(*http.Request) (*http.Response, error) {
	time.Sleep(20 * time.Millisecond)
	l.mu.Lock()
	defer l.mu.Unlock()
	resp := &http.Response{StatusCode: http.StatusOK, Header: http.Header{}, Body: io.NopCloser(strings.NewReader("ok"))}
	now := time.Now()
	if s := now.Unix(); s != l.second {
		l.second, l.taken = s, 0
	}
	if now.Before(l.closed) || l.taken >= l.rate {
		l.refused = append(l.refused, now)
		resp.StatusCode = http.StatusTooManyRequests
		if l.header != "" {
			resp.Header.Set("Retry-After", l.header)
		}
		return resp, nil
	}
	l.taken++
	return resp, nil
}

// ask sends a request until it is not refused, five times at most.
func ask(ctx context.Context, rt http.RoundTripper) (tries int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://h/v2/x/manifests/y", nil)
	if err != nil {
		return 0, err
	}
	for tries = 1; ; tries++ {
		resp, err := rt.RoundTrip(req)
		if err != nil {
			return tries, err
		}
		if err := resp.Body.Close(); err != nil {
			return tries, err
		}
		if resp.StatusCode == http.StatusOK {
			return tries, nil
		}
		if tries == 5 {
			return tries, errors.New("refused")
		}
	}
}

// TestOnePause has a crowd of requests at hosts that refuse: each host gets one
// pause, not one for each request, and the crowd gets through.
func TestOnePause(t *testing.T) {
	const crowd = 60
	for _, tc := range []struct {
		name   string
		host   *limited
		closed time.Duration
		most   int // refusals
	}{
		{"a limit of requests a second", &limited{rate: 10}, 0, crowd + 12},
		{"a limit that says when", &limited{rate: 10, header: "1"}, 0, crowd + 6},
		{"closed for a while", &limited{rate: 1000}, 2 * time.Second, crowd + 12},
		{"closed and says so", &limited{rate: 1000, header: "2"}, 1900 * time.Millisecond, crowd},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				host := tc.host
				host.closed = time.Now().Add(tc.closed)
				all := &peers{cfg: Config{}.withDefaults()}
				rt := paced{host, all}
				var wg sync.WaitGroup
				start := time.Now()
				for range crowd {
					wg.Go(func() {
						if tries, err := ask(t.Context(), rt); err != nil {
							t.Errorf("%d tries, %v", tries, err)
						}
					})
				}
				wg.Wait()
				if len(host.refused) > tc.most {
					t.Errorf("%d refusals for %d requests, want %d at most", len(host.refused), crowd, tc.most)
				}
				s := all.stats()[0]
				if s.Host != "h" || s.Refused != int64(len(host.refused)) || s.Requests != s.Refused+crowd || s.Manifests != s.Requests {
					t.Errorf("counted %+v, %d refusals", s, len(host.refused))
				}
				t.Logf("%d refusals, all served after %v", len(host.refused), time.Since(start))
			})
		})
	}
}

// TestLongPause does not send what would have to wait for too long.
func TestLongPause(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host := &limited{rate: 10, header: "3600", closed: time.Now().Add(time.Hour)}
		rt := paced{host, &peers{cfg: Config{}.withDefaults()}}
		var pause *pauseError
		if tries, err := ask(t.Context(), rt); tries != 2 || !errors.As(err, &pause) || pause.asked != time.Hour {
			t.Errorf("%d tries, %v", tries, err)
		}
		if len(host.refused) != 1 {
			t.Errorf("%d requests were sent", len(host.refused))
		}
		r := &Repository{host: "h", name: named(t), client: New(Config{})}
		if err := r.sendError("x", pause); !errdefs.IsResourceExhausted(err) || !strings.Contains(err.Error(), "1h0m0s") {
			t.Errorf("error %v", err)
		}
		time.Sleep(40 * time.Second)
		if _, err := ask(t.Context(), rt); !errors.As(err, &pause) || len(host.refused) != 2 {
			t.Errorf("%d requests were sent, %v", len(host.refused), err)
		}
	})
}

// TestPauseEnds lets a caller go whose context ends in a pause.
func TestPauseEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		host := &limited{rate: 10, header: "20", closed: time.Now().Add(time.Hour)}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if _, err := ask(ctx, paced{host, &peers{}}); !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	})
}

// TestGivenUpWaits has many requests whose callers go away while these wait for their
// turn: they take nobody's.
func TestGivenUpWaits(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		now := time.Now()
		p := &peer{pacer: pacer{rate: minRate, row: 1, began: now, next: now.Add(time.Second)}}
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		for range 30 {
			wg.Go(func() {
				if err := p.wait(ctx); !errors.Is(err, context.Canceled) {
					t.Errorf("waited: %v", err)
				}
			})
		}
		synctest.Wait()
		cancel()
		wg.Wait()
		if err := p.wait(t.Context()); err != nil || time.Since(now) > 2*time.Second {
			t.Errorf("the next request goes after %v: %v", time.Since(now), err)
		}
	})
}
