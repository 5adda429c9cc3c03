package wireerr

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// hollow unwraps to nothing, as errors of some libraries do.
type hollow struct{}

func (hollow) Error() string { return "hollow" }
func (hollow) Unwrap() error { return nil }

func TestToStatus(t *testing.T) {
	peer := status.Error(codes.Aborted, "from a peer")
	cases := []struct {
		name string
		err  error
		code codes.Code
		text string
	}{
		{"class", fmt.Errorf("open x: %w", errdefs.ErrNotFound), codes.NotFound, "open x: not found"},
		{"hollow branch", fmt.Errorf("%w: %w", errdefs.ErrUnavailable, hollow{}), codes.Unavailable, "unavailable: hollow"},
		{"hollow first", errors.Join(fmt.Errorf("a: %w", hollow{}), errdefs.ErrDataLoss), codes.DataLoss, "a: hollow\ndata loss"},
		{"no class", errors.New("odd"), codes.Unknown, "odd"},
		{"context", fmt.Errorf("wait: %w", context.DeadlineExceeded), codes.DeadlineExceeded, "wait: context deadline exceeded"},
		{"peer", peer, codes.Aborted, "from a peer"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			s, ok := status.FromError(toStatus(c.err))
			if !ok || s.Code() != c.code || s.Message() != c.text {
				t.Errorf("got %v %q", s.Code(), s.Message())
			}
			back := FromStatus(s.Err())
			if back.Error() != c.text || c.code != codes.Aborted && !errors.Is(back, errdefs.Resolve(c.err)) {
				t.Errorf("back: %v", back)
			}
			if native := errgrpc.ToNative(s.Err()); !errors.Is(native, errdefs.Resolve(back)) {
				t.Errorf("clients see %v", native)
			}
		})
	}
}
