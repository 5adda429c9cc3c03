package store

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// Source delivers plain bytes of segments. It is not trusted.
type Source interface {
	// Name identifies the source in logs, errors and Stats.
	Name() string
	// Fetch opens the plain bytes [off, off+n) of the segment. The body gives
	// those n bytes and then io.EOF; it is closed by the caller, early when the
	// caller has changed its mind. Fetch and the body's Read return as soon as
	// ctx is done. ErrNotFound says that this source does not have the segment,
	// any other error that it does not work at present; the store goes on to the
	// next source either way.
	Fetch(ctx context.Context, seg *index.Segment, off, n int64) (io.ReadCloser, error)
}

// Voucher is a Source that can answer for bytes which the store cannot verify.
type Voucher interface {
	// Vouches says whether every byte that Fetch gives of the segment, whose
	// table's algorithm is index.Vouched, was checked against digests that the
	// segment's index names. Only then does the store take them.
	Vouches(seg *index.Segment) bool
}

// Blamer is a body of Source.Fetch that knows who gave its bytes.
type Blamer interface {
	// Blame says that bytes of the body were wrong. It tells whether the source
	// asks somebody else for them the next time.
	Blame(err error) (elsewhere bool)
}

// mayGive fails with ErrNotFound when bytes of the segment cannot be taken from
// this source, which is then as good as one that does not have it.
func (s *source) mayGive(seg *index.Segment) error {
	if seg.Table.Algorithm != index.Vouched {
		return nil
	}
	if v, ok := s.Source.(Voucher); ok && v.Vouches(seg) {
		return nil
	}
	return fmt.Errorf("segment %s has no digests of plain bytes, and this source does not vouch for it: %w", seg.ID, errdefs.ErrNotFound)
}

// source is a Source of one handle and how it has been behaving.
type source struct {
	Source
	stats *sourceCounters
	log   *slog.Logger
	fails atomic.Int32 // in a row
	until atomic.Int64 // Unix nanoseconds; before it the source is asked last
}

const (
	firstPenalty = time.Second // doubles with every failure in a row
	maxPenalty   = time.Minute
)

// note records how a fetch ended. A source that failed is asked after the
// others for a while, so that one that stalls does not cost every read
// Config.Stall.
func (s *source) note(err error) {
	if err == nil {
		s.fails.Store(0)
		return
	}
	s.stats.errors.Add(1)
	if errdefs.IsNotFound(err) {
		return
	}
	n := s.fails.Add(1)
	s.until.Store(time.Now().Add(min(firstPenalty<<min(n-1, 16), maxPenalty)).UnixNano())
	if n == 1 {
		s.log.Warn("source failed, others are asked first", "source", s.Name(), "err", err)
	}
}

func (s *source) suspect(now int64) bool { return s.fails.Load() > 0 && now < s.until.Load() }

// inOrder returns the sources as they should be asked: in the given order, the
// ones that failed lately last.
func inOrder(all []*source) []*source {
	now := time.Now().UnixNano()
	if !slices.ContainsFunc(all, func(s *source) bool { return s.suspect(now) }) {
		return all
	}
	out := slices.Clone(all)
	slices.SortStableFunc(out, func(a, b *source) int {
		switch sa, sb := a.suspect(now), b.suspect(now); {
		case sa == sb:
			return 0
		case sb:
			return -1
		}
		return 1
	})
	return out
}

// causes says of the errors of all sources whether one is of a source that may
// work again, and whether one is of wrong bytes. A source that does not have the
// segment says nothing about the others.
func causes(errs []error) (down, wrong bool) {
	for _, err := range errs {
		switch {
		case errdefs.IsDataLoss(err):
			wrong = true
		case !errdefs.IsNotFound(err):
			down = true
		}
	}
	return down, wrong
}

// exhausted is the error after no source could give a chunk. It is ErrDataLoss
// when every one gave wrong bytes, and ErrUnavailable, which a later read may
// overcome, otherwise. The sources' own classes do not shine through.
func exhausted(what string, errs []error) error {
	if len(errs) == 0 {
		return fmt.Errorf("%s: no source is configured for it: %w", what, errdefs.ErrUnavailable)
	}
	var class error = errdefs.ErrDataLoss
	texts := make([]string, len(errs))
	for i, err := range errs {
		texts[i] = err.Error()
		if !errors.Is(err, errdefs.ErrDataLoss) {
			class = errdefs.ErrUnavailable
		}
	}
	return fmt.Errorf("%s: no source could give it (%s): %w", what, strings.Join(texts, "; "), class)
}
