package run

import (
	"context"
	"fmt"
)

// addresses of a sandbox, in the form of protocols/vsock.
type addresses struct {
	guest, streams string // to dial
	host, relay    string // where the node listens for the sandbox
	registry       string // where to listen for a guest that pulls by itself
	cid            uint32 // of the sandbox, where the listening address is shared
}

// sandbox is where tatami-guest runs.
type sandbox interface {
	// start returns when the sandbox runs; its daemon may not answer yet. All
	// but close is for afterwards.
	start(ctx context.Context) error
	addresses() addresses
	// target is where the container's root file system is to be mounted.
	target() string
	// kind says more about the place for the report; may be empty.
	kind() string
	// done is closed when the sandbox has ended; reason then tells why.
	done() <-chan struct{}
	reason() error
	// close ends the sandbox and removes what it left.
	close(ctx context.Context) error
}

func newSandbox(o *Options, id string) (sandbox, error) {
	if o.VM == None {
		return newLocal(o, id)
	}
	return newMachine(o, id)
}

// watch returns a context that ends, with the reason as its cause, when the
// sandbox ends by itself.
func watch(ctx context.Context, b sandbox) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	finished := make(chan struct{})
	go func() {
		defer close(finished)
		select {
		case <-b.done():
			cancel(fmt.Errorf("the sandbox ended by itself: %w", b.reason()))
		case <-ctx.Done():
		}
	}()
	return ctx, func() { cancel(nil); <-finished }
}
