package store

import (
	"context"
	"errors"
	"fmt"

	"github.com/containerd/errdefs"
	"golang.org/x/sync/errgroup"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// fillRun is how many bytes one fetch of Fill asks for: enough to keep a link
// with some delay busy, little enough that a demand read soon has the link.
const fillRun = 4 << 20

// fill fetches all that is missing of the views' segments.
func (h *handle) fill(ctx context.Context) error {
	if !h.s.cfg.Keep {
		return fmt.Errorf("fill %s: the store keeps nothing: %w", h.what, errdefs.ErrFailedPrecondition)
	}
	eg, running := errgroup.WithContext(ctx)
	eg.SetLimit(h.s.cfg.FillParallel)
	for i := range h.views {
		v := &h.views[i]
		v.seg.checkLinks()
		for from, to := 0, 0; from < len(v.seg.table.Chunks) && running.Err() == nil; from = to {
			to = v.seg.runFrom(from, fillRun)
			if v.seg.allPresent(from, to) {
				continue
			}
			eg.Go(func() error {
				if err := h.yield(running); err != nil {
					return err
				}
				return v.fetch(sched.WithRank(running, sched.Background), from, to, fillRun, true)
			})
		}
	}
	if err := eg.Wait(); err != nil {
		return fmt.Errorf("fill %s: %w", h.what, err)
	}
	return ctx.Err()
}

// yield lets demand reads go first.
func (h *handle) yield(ctx context.Context) error {
	s := h.s
	if s.demand.open(s.fillQuiet) {
		return ctx.Err()
	}
	s.stats.heldBack.Add(1)
	return s.demand.pass(ctx, s.fillQuiet, s.fillPatience)
}

// runFrom returns the end of the run of chunks from number from on that spans
// at most n bytes, or one chunk.
func (g *segment) runFrom(from int, n int64) int {
	to := from + 1
	for to < len(g.table.Chunks) && g.table.Chunks[to].End()-g.table.Chunks[from].Off <= n {
		to++
	}
	return to
}

func (g *segment) allPresent(from, to int) bool {
	for i := from; i < to; i++ {
		if !g.isPresent(i) {
			return false
		}
	}
	return true
}

// fetch brings the chunks [from, to) that are wanted and waits for them and for
// those that others are fetching. With kept it fails when they cannot be kept.
func (v *view) fetch(ctx context.Context, from, to int, limit int64, kept bool) error {
	g := v.seg
	for tries := 1; ; tries++ {
		r := &read{done: make(chan struct{}), tries: tries, rank: max(sched.RankOf(ctx), sched.Prefetch), from: from, to: to}
		g.mu.Lock()
		if kept {
			g.s.mem.discard(g, from, to) // could not be kept when they came; perhaps now
		}
		fetches := v.claim(from, to, limit, nil, r.rank)
		for i := from; i < to; i++ {
			if g.claims[i] != nil {
				g.wait(i, waiter{h: v.h, r: r, kept: kept})
			}
		}
		g.mu.Unlock()
		v.h.start(fetches)
		if !r.waits {
			return ctx.Err()
		}
		if err := v.sleep(ctx, r); !errors.Is(err, errAgain) {
			return err
		}
	}
}

// prefetch fetches the chunks that touch [off, off+n) of the segment.
func (v *view) prefetch(ctx context.Context, off, n int64) error {
	from, to := v.seg.span(off, off+n)
	return v.fetch(ctx, from, to, v.h.s.cfg.MaxWindow, false)
}
