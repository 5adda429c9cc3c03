package store

import (
	"cmp"
	"context"
	"slices"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/tatami-containers/tatami/rootfs/index"
)

const (
	// maxRun is how many bytes of what is expected are put in order of their offsets, and
	// fetched in one piece where they are neighbours.
	maxRun = 1 << 20
	// runGap is how many bytes nobody expects between two ranges are fetched with them
	// rather than asking twice.
	runGap = 64 << 10
	// replayParallel is how many runs are on their way at a time.
	replayParallel = 4
	// replayQuiet and replayPatience say how a Replay yields to demand reads: it begins a
	// run when none waits, or has let them go first for so long.
	replayQuiet    = time.Millisecond
	replayPatience = 50 * time.Millisecond
)

// Replay fetches what earlier uses of the image have read, in their order, for the
// readers that the recording sees. Without Keep it is never more than ahead bytes ahead
// of them, and never more than half of Config.Memory. It passes over what is here and
// what is not of the image, and gives up what readers have left behind. It returns when
// all is fetched, at the first range that no source can give, and when ctx ends, which is
// no error.
func (r *Recording) Replay(ctx context.Context, expected []index.Range, ahead int64) error {
	s := r.img.h.s
	if !s.cfg.Keep {
		ahead = min(ahead, s.cfg.Memory/2)
	}
	p := &replay{Recording: r, ahead: ahead, runs: mergeRuns(r.img.inside(expected), min(maxRun, ahead/8))}
	eg, running := errgroup.WithContext(ctx)
	eg.SetLimit(replayParallel)
	for k, run := range p.runs {
		if p.waitForRoom(running, k) != nil || s.demand.pass(running, replayQuiet, replayPatience) != nil {
			break
		}
		p.bring(run)
		eg.Go(func() error { return r.img.Prefetch(running, run.Off, run.Len) })
	}
	if err := eg.Wait(); err != nil && ctx.Err() == nil {
		return err
	}
	return nil
}

// replay is one Replay at work.
type replay struct {
	*Recording
	ahead int64 // bytes
	runs  []index.Range
	tail  int // runs before it are left behind
}

// inside clips ranges to what can be fetched of the image.
func (i *Image) inside(ranges []index.Range) []index.Range {
	out := make([]index.Range, 0, len(ranges))
	for _, r := range ranges {
		from, to := max(r.Off, i.image.record.BootSize), min(r.Len, i.size-min(max(r.Off, 0), i.size))+r.Off
		if r.Off >= 0 && from < to {
			out = append(out, index.Range{Off: from, Len: to - from})
		}
	}
	return out
}

// mergeRuns makes runs of at most size bytes of ranges: it keeps their order but among
// those that come within so many bytes.
func mergeRuns(ranges []index.Range, size int64) (runs []index.Range) {
	for len(ranges) > 0 {
		n, sum := 1, ranges[0].Len
		for n < len(ranges) && sum+ranges[n].Len <= size {
			sum += ranges[n].Len
			n++
		}
		batch := slices.SortedFunc(slices.Values(ranges[:n]), func(a, b index.Range) int { return cmp.Compare(a.Off, b.Off) })
		run := batch[0]
		for _, r := range batch[1:] {
			if r.Off-run.Off-run.Len > runGap {
				runs, run = appendCut(runs, run, size), r
				continue
			}
			run.Len = max(run.Len, r.Off+r.Len-run.Off)
		}
		runs, ranges = appendCut(runs, run, size), ranges[n:]
	}
	return runs
}

// appendCut appends a run in pieces of at most size bytes.
func appendCut(runs []index.Range, run index.Range, size int64) []index.Range {
	for size = max(size, index.UnitSize); run.Len > size; run.Off, run.Len = run.Off+size, run.Len-size {
		runs = append(runs, index.Range{Off: run.Off, Len: size})
	}
	return append(runs, run)
}

// bring notes what of a run is about to be fetched.
func (p *replay) bring(run index.Range) {
	stats := &p.img.h.s.stats
	p.img.h.eachPart(run, func(v *view, from, to int) {
		v.seg.mu.Lock()
		defer v.seg.mu.Unlock()
		p.mu.Lock()
		defer p.mu.Unlock()
		m := p.seen[v]
		for i := from; i < to && !p.ended; i++ {
			if v.seg.wanted(i) && !m.read.has(i) && m.brought.set(i) {
				n := v.seg.table.Chunks[i].Len
				p.unread += n
				stats.replayed.Add(n)
			}
		}
	})
}

// waitForRoom waits until run k may be fetched.
func (p *replay) waitForRoom(ctx context.Context, k int) error {
	for !p.img.h.s.cfg.Keep && p.due(k)+p.runs[k].Len > p.ahead && p.tail < k {
		select {
		case <-p.fresh:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return ctx.Err()
}

// due is how many bytes have come, or are on their way, of the runs before k and wait
// for their readers. Runs that lie a quarter of the budget behind one that was read,
// before or behind k, are left behind: their readers do not come, or find them in memory,
// which drops them first.
func (p *replay) due(k int) (sum int64) {
	behind, reached := int64(0), false
	for j := p.horizon(k) - 1; j >= p.tail; j-- {
		waiting, read := p.state(p.runs[j])
		if reached = reached || read; reached {
			behind += p.runs[j].Len
		}
		if behind > p.ahead/4 {
			p.tail = min(k, j+1)
			break
		}
		sum += waiting
	}
	return sum
}

// horizon is the end of the runs from k on that readers may have come to by themselves.
func (p *replay) horizon(k int) int {
	for n := int64(0); k < len(p.runs) && n < p.ahead; k++ {
		n += p.runs[k].Len
	}
	return k
}

// state says how many bytes of a run were brought and wait for their readers, and
// whether any of it was read.
func (p *replay) state(run index.Range) (waiting int64, read bool) {
	p.img.h.eachPart(run, func(v *view, from, to int) {
		p.mu.Lock()
		defer p.mu.Unlock()
		m := p.seen[v]
		for i := from; i < to; i++ {
			if m.read.has(i) {
				read = true
			} else if m.brought.has(i) {
				waiting += v.seg.table.Chunks[i].Len
			}
		}
	})
	return waiting, read
}

// eachPart calls do with the chunks [from, to) of each segment that a range of the
// image touches. Precondition: the range lies in the image's segments.
func (h *handle) eachPart(r index.Range, do func(v *view, from, to int)) {
	for off, end := r.Off, r.Off+r.Len; off < end; {
		v := h.viewAt(off)
		from, to := v.seg.span(off-v.desc.Off, min(end, v.desc.End())-v.desc.Off)
		do(v, from, to)
		off = v.desc.End()
	}
}
