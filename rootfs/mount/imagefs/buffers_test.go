package imagefs

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

func TestBuffersStayInBudget(t *testing.T) {
	const budget = 2 << 20
	b := newBuffers(budget)
	var wg sync.WaitGroup
	for i := range 16 {
		wg.Go(func() {
			for j := range 200 {
				n := 1 << (10 + (i+j)%11) // 1 KiB to 1 MiB
				buf, err := b.get(t.Context(), n)
				if err != nil || len(buf) != n {
					t.Errorf("get %d: %d bytes, %v", n, len(buf), err)
					return
				}
				buf[0], buf[n-1] = 1, 1
				b.mu.Lock()
				if b.mapped > budget {
					t.Errorf("%d bytes are mapped, the budget is %d", b.mapped, budget)
				}
				b.mu.Unlock()
				b.put(buf)
			}
		})
	}
	wg.Wait()
	b.trim()
	if b.mapped != 0 {
		t.Errorf("%d bytes left after trim", b.mapped)
	}
	late, err := b.get(t.Context(), 4096)
	if err != nil {
		t.Fatal(err)
	}
	b.close()
	b.put(late)
	if b.mapped != 0 {
		t.Errorf("%d bytes left after close", b.mapped)
	}
}

func TestBuffersWait(t *testing.T) {
	b := newBuffers(1 << 20)
	defer b.close()
	all, err := b.get(t.Context(), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := b.get(ctx, 1); !errors.Is(err, context.Canceled) {
		t.Errorf("got %v", err)
	}
	b.put(all)
	if _, err := b.get(t.Context(), 1<<20+1); err == nil {
		t.Error("got more than the largest class")
	}
}

func TestComplaintsAreFew(t *testing.T) {
	var out strings.Builder
	now := time.Unix(0, 0)
	c := complaints{log: slog.New(slog.NewTextHandler(&out, nil)), now: func() time.Time { return now }, seen: make(map[complaint]*complaintCount)}
	for range 1000 {
		c.add("a", "example.com/a", 0, 4096, errdefs.ErrUnavailable)
		c.add("b", "example.com/b", 0, 4096, errdefs.ErrUnavailable)
		c.add("a", "example.com/a", 0, 4096, io.ErrUnexpectedEOF)
	}
	if n := strings.Count(out.String(), "\n"); n != 3 {
		t.Errorf("%d lines for two files and two classes:\n%s", n, out.String())
	}
	now = now.Add(complainEvery)
	c.add("a", "example.com/a", 0, 4096, errdefs.ErrUnavailable)
	if !strings.Contains(out.String(), "not_logged=999") {
		t.Errorf("what was not logged is not counted:\n%s", out.String())
	}
	c.forget("a")
	if len(c.seen) != 1 {
		t.Errorf("%d kinds are remembered", len(c.seen))
	}
}
