package ociserve

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"testing"
	"time"
)

// blink is long enough for what must not happen to happen.
const blink = 100 * time.Millisecond

// TestConnections: clients hold so many connections and no more; what they close is
// free for others.
func TestConnections(t *testing.T) {
	s := open(t, 10)
	s.Server = New(Config{Requests: 1, Answer: func(http.ResponseWriter, *http.Request) error { return nil }})
	_, addr := s.serve(t, "tcp")
	var all []net.Conn
	for range 3 * connsPerSlot { // more than there may be at a time
		c := dial(t, addr)
		ask(t, c)
		if all = append(all, c); len(all) == connsPerSlot {
			all[0].Close()
			all = all[1:]
		}
	}
	all = append(all, dial(t, addr))
	ask(t, all[len(all)-1])
	late := dial(t, addr)
	if _, err := fmt.Fprint(late, "GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	_ = late.SetReadDeadline(time.Now().Add(blink)) // never fails on a connection that is open
	if n, err := late.Read(make([]byte, 1)); n != 0 || !errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("connection %d gets %d bytes, %v", connsPerSlot+1, n, err)
	}
	all[0].Close()
	answered(t, late)
}

func dial(t *testing.T, addr string) net.Conn {
	t.Helper()
	c, err := new(net.Dialer).DialContext(t.Context(), "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

func ask(t *testing.T, c net.Conn) {
	t.Helper()
	if _, err := fmt.Fprint(c, "GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	answered(t, c)
}

func answered(t *testing.T, c net.Conn) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(20 * time.Second)) // never fails on a connection that is open
	resp, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
}

// TestShutdownWaits: whoever has shut a server down may close what it read from.
func TestShutdownWaits(t *testing.T) {
	s := open(t, 10)
	begun, free := make(chan struct{}), make(chan struct{})
	s.Server = New(Config{Answer: func(http.ResponseWriter, *http.Request) error { close(begun); <-free; return nil }})
	_, addr := s.serve(t, "tcp")
	if _, err := fmt.Fprint(dial(t, addr), "GET /v2/ HTTP/1.1\r\nHost: x\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	<-begun
	now, cancel := context.WithCancel(t.Context())
	cancel()
	ended := make(chan struct{})
	go func() { defer close(ended); s.Shutdown(now) }()
	select {
	case <-ended:
		t.Error("it does not wait for a request that is being answered")
	case <-time.After(blink):
	}
	close(free)
	<-ended
}

// TestTwoRanges: a second header with a range is not overlooked.
func TestTwoRanges(t *testing.T) {
	for _, header := range [][]string{{"bytes=0-1", "bytes=2-3"}, {"bytes=0-1,2-3"}, {"bytes=0-1", ""}} {
		var f *Failure
		if _, _, _, err := parseRange(header, 10); !errors.As(err, &f) || f.Status != http.StatusBadRequest {
			t.Errorf("%s: %v", strings.Join(header, " | "), err)
		}
	}
}
