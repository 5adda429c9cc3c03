package ociserve

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

func TestRankOf(t *testing.T) {
	for _, tc := range []struct {
		header []string
		want   sched.Rank
	}{
		{nil, sched.Demand},
		{[]string{""}, sched.Demand},
		{[]string{"u=0"}, sched.Demand},
		{[]string{"u=3"}, sched.Demand},
		{[]string{"u=4"}, sched.Prefetch},
		{[]string{"u=5, i"}, sched.Prefetch},
		{[]string{"i;q=1,\tu=5;x=y"}, sched.Prefetch},
		{[]string{"u=6"}, sched.Background},
		{[]string{"u=7"}, sched.Background},
		{[]string{"u=7, u=1"}, sched.Demand}, // the last one counts
		{[]string{"u=1", "u=7"}, sched.Background},
		{[]string{"u=8"}, sched.Demand}, // no urgency
		{[]string{"u=-1"}, sched.Demand},
		{[]string{"u=5.0"}, sched.Demand},
		{[]string{"u=55"}, sched.Demand},
		{[]string{"u"}, sched.Demand},
		{[]string{"xu=7"}, sched.Demand},
		{[]string{"U=7"}, sched.Demand}, // keys are lower case
		{[]string{`u="7"`}, sched.Demand},
	} {
		if got := rankOf(http.Header{"Priority": tc.header}); got != tc.want {
			t.Errorf("%q: %s, want %s", tc.header, got, tc.want)
		}
	}
}

// What a client says that it does not wait for takes half of the slots at most.
func TestLaterSlots(t *testing.T) {
	hold := make(chan struct{})
	var at [sched.Background + 1]atomic.Int64
	s := open(t, 10)
	s.Server = New(Config{Requests: 4, Answer: func(_ http.ResponseWriter, req *http.Request) error {
		at[sched.RankOf(req.Context())].Add(1)
		<-hold
		return nil
	}})
	client, _ := s.serve(t, "tcp")
	var wg sync.WaitGroup
	for k := range 8 {
		wg.Go(func() { request(t, client, []string{"u=5", "u=7"}[k%2]) })
	}
	waitFor(t, func() bool { return at[sched.Prefetch].Load()+at[sched.Background].Load() == 2 })
	for range 2 {
		wg.Go(func() { request(t, client, "") })
	}
	waitFor(t, func() bool { return at[sched.Demand].Load() == 2 })
	if n := at[sched.Prefetch].Load() + at[sched.Background].Load(); n != 2 {
		t.Errorf("%d requests that nobody waits for are answered", n)
	}
	close(hold)
	wg.Wait()
	if n := at[sched.Prefetch].Load() + at[sched.Background].Load(); n != 8 {
		t.Errorf("%d requests were answered in the end", n)
	}
}

func request(t *testing.T, client *http.Client, priority string) {
	req, err := http.NewRequestWithContext(t.Context(), "GET", "http://x/v2/", nil)
	if err != nil {
		t.Error(err)
		return
	}
	if priority != "" {
		req.Header.Set("Priority", priority)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Error(err)
		return
	}
	resp.Body.Close()
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !ok(); time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatal("waited in vain")
		}
	}
}

// takeAll takes all turns of a queue.
func takeAll(q *sched.Slots) (leave func()) {
	var leaves []func()
	for {
		ctx, cancel := context.WithTimeout(context.Background(), 20*time.Millisecond)
		leave, err := q.Enter(ctx)
		cancel()
		if err != nil {
			break
		}
		leaves = append(leaves, leave)
	}
	return func() {
		for _, leave := range leaves {
			leave()
		}
	}
}

// Every piece waits for its turn, whether it is copied or sent from a file.
func TestPiecesWait(t *testing.T) {
	for _, name := range []string{"copied", "from file"} {
		t.Run(name, func(t *testing.T) {
			turns, err := sched.New(sched.Config{})
			if err != nil {
				t.Fatal(err)
			}
			s := open(t, 3<<20)
			s.cfg.Queue = turns.Relay()
			if name == "copied" {
				s.body = func(off, n int64) io.ReadCloser {
					return copied{&filed{f: s.file, at: off, left: n, mapped: &s.mapped}}
				}
			}
			client, _ := s.serve(t, "tcp")
			leave := takeAll(turns.Relay())
			done := make(chan error, 1)
			go func() {
				got, err := get(t, client, "")
				if err == nil && string(got) != string(s.data) {
					err = fmt.Errorf("%d bytes that are wrong", len(got))
				}
				done <- err
			}()
			waitFor(t, func() bool { return waiting(turns, "relay") == 1 })
			if n := s.cfg.Sent.Load(); n != 0 {
				t.Errorf("%d bytes were sent without a turn", n)
			}
			leave()
			if err := <-done; err != nil {
				t.Error(err)
			}
			s.quiet(t)
			if name == "from file" != (s.mapped.Load() > 0) {
				t.Errorf("%d bytes from the file", s.mapped.Load())
			}
		})
	}
}

// waiting is how many wait in a queue.
func waiting(s *sched.Scheduler, queue string) (n int) {
	for _, q := range s.Status().Queues {
		if q.Name != queue {
			continue
		}
		for _, c := range q.Classes {
			for _, w := range c.Waiting {
				n += w
			}
		}
	}
	return n
}

// A client that takes nothing of its answer keeps nobody else from getting his.
func TestStalledTurn(t *testing.T) {
	turns, err := sched.New(sched.Config{})
	if err != nil {
		t.Fatal(err)
	}
	s := open(t, 64<<20) // more than socket buffers hold
	s.cfg.Queue, s.cfg.Stall = turns.Relay(), time.Minute
	client, addr := s.serve(t, "tcp")
	for range 12 { // more than there are turns on this machine, or as many as may be
		c, err := net.Dial("tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if _, err := fmt.Fprint(c, "GET /v2/a/blobs/b HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
	}
	waitFor(t, func() bool { return len(s.slots) == 12 && s.mapped.Load() > 0 })
	got, err := get(t, client, "bytes=0-1048575")
	if err != nil || string(got) != string(s.data[:1<<20]) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
}
