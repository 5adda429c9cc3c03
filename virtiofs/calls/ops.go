package calls

import (
	"context"
	"encoding/json"
	"fmt"
	"os"

	"github.com/containerd/errdefs"
)

// Ops are handlers by the names of their calls.
type Ops map[string]Handler

// Handle is the Handler of them all.
func (o Ops) Handle(ctx context.Context, op string, args json.RawMessage, files []*os.File) (any, []*os.File, error) {
	h := o[op]
	if h == nil {
		closeAll(files)
		return nil, nil, fmt.Errorf("call of %q: %w", op, errdefs.ErrNotImplemented)
	}
	return h(ctx, op, args, files)
}

// Op makes a Handler that takes count descriptors and arguments of type A, and
// answers with a result of type R.
func Op[A, R any](count int, f func(ctx context.Context, args A, files []*os.File) (R, error)) Handler {
	return func(ctx context.Context, op string, data json.RawMessage, files []*os.File) (any, []*os.File, error) {
		var args A
		err := json.Unmarshal(data, &args)
		if err == nil && len(files) != count {
			err = fmt.Errorf("%d descriptors instead of %d", len(files), count)
		}
		if err != nil {
			closeAll(files)
			return nil, nil, fmt.Errorf("call of %s: %w: %w", op, errdefs.ErrInvalidArgument, err)
		}
		result, err := f(ctx, args, files)
		return result, nil, err
	}
}
