package isolation

import (
	"context"
	"fmt"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
)

// storm is a number of sandboxes that start at the same time, each with its own part of
// an image or with an image of its own.
type storm struct {
	boxes  []*sandbox
	images []string
	parts  [][]string
}

// newStorm starts the daemons of sandboxes of a class that will read one image.
func (n *node) newStorm(tb testing.TB, class string, count int, image string, names []string) *storm {
	tb.Helper()
	st := &storm{}
	for i := range count {
		st.add(n.launch(tb, class), image, names[i*len(names)/count:(i+1)*len(names)/count])
	}
	return st
}

func (st *storm) add(b *sandbox, image string, names []string) {
	st.boxes, st.images, st.parts = append(st.boxes, b), append(st.images, image), append(st.parts, names)
}

// stormResult is what a storm took. Errors are those of reads.
type stormResult struct {
	began, ended time.Time
	bytes        int64
	errors       []string
}

func (r stormResult) seconds() float64 { return r.ended.Sub(r.began).Seconds() }

// begin lets the storm run on while others do what they do; end waits for it.
func (st *storm) begin() (end func() (stormResult, error)) {
	var r stormResult
	var g errgroup.Group
	g.Go(func() (err error) {
		r, err = st.run(context.Background())
		return err
	})
	return func() (stormResult, error) {
		err := g.Wait()
		return r, err
	}
}

// run has all sandboxes pull and read, and returns when the last has.
func (st *storm) run(ctx context.Context) (stormResult, error) {
	results := make([]readResult, len(st.boxes))
	out := stormResult{began: time.Now()}
	var g errgroup.Group
	for i, b := range st.boxes {
		g.Go(func() error {
			err := b.connect(ctx)
			if err == nil {
				err = b.pull(ctx, st.images[i])
			}
			if err == nil {
				results[i], err = b.read(st.parts[i])
			}
			if err != nil {
				return fmt.Errorf("sandbox %d of the storm: %w", i, err)
			}
			return nil
		})
	}
	err := g.Wait()
	out.ended = out.began
	for _, r := range results {
		out.bytes += r.Bytes
		out.errors = append(out.errors, r.Errors...)
		if at := time.Unix(0, r.Ended); at.After(out.ended) {
			out.ended = at
		}
	}
	return out, err
}
