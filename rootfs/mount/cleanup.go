package mount

import (
	"context"
	"errors"
	"time"
)

// undoTimeout bounds the undoing of a failed operation.
const undoTimeout = 10 * time.Second

// undoStack collects how to take back what was done, and does so in reverse.
type undoStack struct{ steps []func(context.Context) error }

func (u *undoStack) push(f func(context.Context) error) { u.steps = append(u.steps, f) }

// run undoes everything under a context that outlives ctx, and adds what went
// wrong to err.
func (u *undoStack) run(ctx context.Context, err error) error {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), undoTimeout)
	defer cancel()
	for i := len(u.steps) - 1; i >= 0; i-- {
		err = errors.Join(err, u.steps[i](ctx))
	}
	u.steps = nil
	return err
}
