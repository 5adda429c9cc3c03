package link

import (
	"bytes"
	"context"
	"crypto/rand"
	"io"
	"net"
	"testing"
	"time"
)

func TestParseShape(t *testing.T) {
	for _, c := range []struct {
		in   string
		want Shape
		bad  bool
	}{
		{in: "", want: Shape{}},
		{in: "1gbit,5ms", want: Shape{Rate: 125e6, RTT: 5 * time.Millisecond}},
		{in: "100mbit", want: Shape{Rate: 12.5e6}},
		{in: "8kbit", want: Shape{Rate: 1000}},
		{in: " 20ms ", want: Shape{RTT: 20 * time.Millisecond}},
		{in: "fast", bad: true},
		{in: "-1gbit", bad: true},
		{in: "0bit", bad: true},
		{in: "-5ms", bad: true},
	} {
		got, err := ParseShape(c.in)
		if (err != nil) != c.bad || got != c.want {
			t.Errorf("ParseShape(%q) = %+v, %v", c.in, got, err)
		}
	}
}

// fakeClock passes time only when somebody sleeps.
type fakeClock struct{ now time.Time }

func (c *fakeClock) Now() time.Time { return c.now }

func (c *fakeClock) Sleep(_ context.Context, d time.Duration) error {
	c.now = c.now.Add(d)
	return nil
}

func TestPacerKeepsTheRate(t *testing.T) {
	c := &fakeClock{now: time.Unix(0, 0)}
	p := &pacer{clock: c, rate: 1e6}
	var last time.Time
	for range 1000 {
		at, err := p.take(t.Context(), 10_000)
		if err != nil {
			t.Fatal(err)
		}
		if !at.After(last) {
			t.Fatalf("bytes arrive at %v, those before them at %v", at, last)
		}
		if ahead := at.Sub(c.now); ahead > backlog+10*time.Millisecond {
			t.Fatalf("took %v of work ahead of the clock", ahead)
		}
		last = at
	}
	if got := last.Sub(time.Unix(0, 0)); got != 10*time.Second {
		t.Errorf("10 MB at 1 MB/s arrive after %v", got)
	}
}

func TestLinkCarriesBytesAndHalfClose(t *testing.T) {
	echo := listen(t)
	go func() {
		for {
			c, err := echo.Accept()
			if err != nil {
				return
			}
			go func() {
				b, _ := io.ReadAll(c) // until the client's half close
				_, _ = c.Write(b)
				c.Close()
			}()
		}
	}()
	l := New(echo.Addr().String(), Shape{Rate: 50e6, RTT: time.Millisecond})
	front := listen(t)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- l.Serve(ctx, front) }()

	want := make([]byte, 3<<20+17)
	if _, err := rand.Read(want); err != nil {
		t.Fatal(err)
	}
	c, err := net.Dial("tcp", front.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	go func() {
		_, _ = c.Write(want)
		_ = c.(*net.TCPConn).CloseWrite()
	}()
	got, err := io.ReadAll(c)
	if err != nil || !bytes.Equal(got, want) {
		t.Fatalf("%d of %d bytes came back, %v", len(got), len(want), err)
	}
	if l.Bytes() != int64(len(want)) {
		t.Errorf("counted %d bytes of %d", l.Bytes(), len(want))
	}
	open, err := net.Dial("tcp", front.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	if _, err := open.Read(make([]byte, 1)); err == nil {
		t.Error("a connection outlived its link")
	}
}

func listen(t *testing.T) net.Listener {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l
}
