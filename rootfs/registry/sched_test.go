package registry

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

func newSched(t *testing.T, cfg sched.Config) *sched.Scheduler {
	t.Helper()
	s, err := sched.New(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// as returns a context of new work.
func as(t *testing.T, s *sched.Scheduler, class, sandbox string) context.Context {
	return sched.With(t.Context(), sched.NewWork(sched.Standing{Flow: s.Flow(class, sandbox)}))
}

// zeros answers ranges of any blob with zeros; begun is called before.
func zeros(t *testing.T, begun func(*http.Request)) string {
	srv := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		begun(r)
		var first, last int
		if _, err := fmt.Sscanf(r.Header.Get("Range"), "bytes=%d-%d", &first, &last); err != nil {
			t.Error(err)
			return
		}
		w.Header().Set("Content-Range", fmt.Sprintf("bytes %d-%d/*", first, last))
		w.Header().Set("Content-Length", fmt.Sprint(last-first+1))
		w.WriteHeader(http.StatusPartialContent)
		_, _ = w.Write(make([]byte, last-first+1)) // the client may have gone
	}))
	t.Cleanup(srv.Close)
	return strings.TrimPrefix(srv.URL, "http://")
}

func scheduledRepository(t *testing.T, cfg Config, host string) (*Client, *Repository) {
	t.Helper()
	c := New(cfg)
	t.Cleanup(func() { _ = c.Close() }) // never fails
	name, err := reference.ParseNormalizedNamed(host + "/x/y")
	if err != nil {
		t.Fatal(err)
	}
	return c, c.Repository(name)
}

func readRange(ctx context.Context, r *Repository, blob digest.Digest, n int64) error {
	body, err := r.Range(ctx, blob, 0, n)
	if err != nil {
		return err
	}
	defer body.Close()
	got, err := io.Copy(io.Discard, body)
	if err == nil && got != n {
		err = fmt.Errorf("%d of %d bytes", got, n)
	}
	return err
}

// TestOnlineHasRequestsLeft has a registry that answers batch work only when online work
// has been served: however many requests batch makes, there is one left.
func TestOnlineHasRequestsLeft(t *testing.T) {
	batchBlob, onlineBlob := digest.FromString("batch"), digest.FromString("online")
	served := make(chan struct{})
	var waiting atomic.Int64
	host := zeros(t, func(r *http.Request) {
		if strings.Contains(r.URL.Path, batchBlob.Encoded()) {
			waiting.Add(1)
			<-served
		}
	})
	s := newSched(t, sched.Config{})
	_, repo := scheduledRepository(t, Config{Sched: s, Hedge: -1}, host)
	var wg sync.WaitGroup
	const requests = 100
	for i := range requests {
		wg.Go(func() {
			if err := readRange(as(t, s, "batch", fmt.Sprint(i)), repo, batchBlob, 100); err != nil {
				t.Error(err)
			}
		})
	}
	queued := func() (n int) {
		for _, q := range s.Status().Queues {
			if q.Name == "requests "+host {
				n = q.Classes[1].Waiting[sched.Demand]
			}
		}
		return n
	}
	for queued() == 0 || queued()+int(waiting.Load()) < requests {
		time.Sleep(time.Millisecond)
	}
	if err := readRange(as(t, s, "online", "o"), repo, onlineBlob, 100); err != nil {
		t.Error(err)
	}
	if n := waiting.Load(); n == requests {
		t.Errorf("%d requests of batch were sent", n)
	}
	close(served)
	wg.Wait()
	for _, q := range s.Status().Queues {
		if q.Name == host && (q.Classes[0].Total != 100 || q.Classes[1].Total != 100*requests) {
			t.Errorf("bytes of online %d, of batch %d", q.Classes[0].Total, q.Classes[1].Total)
		}
	}
}

// TestRefusedInOrder has a host that takes two requests a second after it refused some:
// who is online goes before those of batch that came earlier, but for the one that is
// next already.
func TestRefusedInOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSched(t, sched.Config{})
		now := time.Now()
		p := &peer{line: s.Turns("paced", 1), pacer: pacer{rate: 2, row: 1, began: now, next: now.Add(time.Second)}}
		var mu sync.Mutex
		var order []string
		var wg sync.WaitGroup
		request := func(class, name string) {
			wg.Go(func() {
				if err := p.wait(as(t, s, class, name)); err != nil {
					t.Error(err)
				}
				mu.Lock()
				defer mu.Unlock()
				order = append(order, name)
			})
			synctest.Wait()
		}
		for i := range 4 {
			request("batch", fmt.Sprint("batch", i))
		}
		request("online", "online")
		wg.Wait()
		if want := []string{"batch0", "online", "batch1", "batch2", "batch3"}; !slices.Equal(order, want) {
			t.Errorf("requests went as %v", order)
		}
		if took := time.Since(now); took < 3*time.Second {
			t.Errorf("5 requests took %v", took)
		}
		synctest.Wait()
		time.Sleep(time.Second) // the turn of the last one
	})
}

// TestGivenUpInLine has the first of a line go away, who waits for a pause to end.
func TestGivenUpInLine(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newSched(t, sched.Config{})
		now := time.Now()
		p := &peer{line: s.Turns("paced", 1), pacer: pacer{rate: 2, row: 1, began: now, until: now.Add(20 * time.Second)}}
		ctx, cancel := context.WithCancel(as(t, s, "batch", "b"))
		gone := make(chan error)
		go func() { gone <- p.wait(ctx) }()
		synctest.Wait()
		cancel()
		if err := <-gone; !errors.Is(err, context.Canceled) {
			t.Errorf("it ends with %v", err)
		}
		if err := p.wait(as(t, s, "online", "o")); err != nil || time.Since(now) > 21*time.Second {
			t.Errorf("the next one goes after %v, %v", time.Since(now), err)
		}
		time.Sleep(time.Second) // the turn ends
	})
}

// TestTurnsAreNoStall has readers that wait for their turn for longer than an answer may
// stand still: that is not the registry's fault.
func TestTurnsAreNoStall(t *testing.T) {
	host := zeros(t, func(*http.Request) {})
	s := newSched(t, sched.Config{Link: 60 << 10})
	c, repo := scheduledRepository(t, Config{Sched: s, Stall: time.Second, Hedge: time.Second / 2}, host)
	// The usual wait is short, so that a second request would be sent soon.
	c.peers.get(host).waited(time.Millisecond)
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			if err := readRange(as(t, s, "batch", fmt.Sprint(i)), repo, digest.FromString("x"), 40<<10); err != nil {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	h := c.Stats().Hosts[0]
	if h.Hedges != 0 || h.Retries != 0 || h.Late != 0 || h.Requests != 6 {
		t.Errorf("%d requests, %d second ones, %d again, %d late", h.Requests, h.Hedges, h.Retries, h.Late)
	}
}

// TestTurnEndsWithContext has a reader give up that waits for its turn.
func TestTurnEndsWithContext(t *testing.T) {
	host := zeros(t, func(*http.Request) {})
	s := newSched(t, sched.Config{Link: 20 << 10})
	_, repo := scheduledRepository(t, Config{Sched: s}, host)
	ctx, cancel := context.WithTimeout(as(t, s, "batch", "b"), 100*time.Millisecond)
	defer cancel()
	if err := readRange(ctx, repo, digest.FromString("x"), 1<<20); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("it ends with %v", err)
	}
}

// TestAnswersHeldUpHaveNoTurns has somebody take nothing of as many answers as a host
// may send: others get theirs.
func TestAnswersHeldUpHaveNoTurns(t *testing.T) {
	s := newSched(t, sched.Config{})
	_, repo := scheduledRepository(t, Config{Sched: s, Hedge: -1}, zeros(t, func(*http.Request) {}))
	blob := digest.FromString("blob")
	for range 32 {
		body, err := repo.Range(as(t, s, "online", "takes nothing"), blob, 0, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
		defer body.Close()
	}
	ctx, cancel := context.WithTimeout(as(t, s, "online", "other"), 20*time.Second)
	defer cancel()
	if err := readRange(ctx, repo, blob, 1<<10); err != nil {
		t.Fatal(err)
	}
}

// TestTokenTakesNoTurn has a registry send as many answers as it may: the token for one
// more does not wait for them.
func TestTokenTakesNoTurn(t *testing.T) {
	s := newSched(t, sched.Config{})
	up := s.Upstream("registry.example.com")
	for range 32 {
		end, err := up.Begin(as(t, s, "online", "others"))
		if err != nil {
			t.Fatal(err)
		}
		defer end()
	}
	c := newTokenCache(new(atomic.Int64))
	defer c.close()
	f := &tokenFetch{work: sched.NewShared()}
	c.look(f, func(ctx context.Context) (string, error) {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		defer cancel()
		end, err := paced{}.turn(ctx, &peer{}, up)
		if err == nil {
			end()
		}
		return "", err
	}, Lookup{})
	if f.err != nil {
		t.Fatal(f.err)
	}
}
