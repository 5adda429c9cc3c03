package service

import (
	"context"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/status"
)

// StatusErrors is where errors become ttrpc statuses: the class decides the
// code, the message stays. Handlers below it return ordinary errors.
func StatusErrors(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	resp, err := method(ctx, unmarshal)
	if err != nil {
		return nil, toStatus(err)
	}
	return resp, nil
}

func toStatus(err error) error {
	if _, ok := status.FromError(err); ok {
		return err // of a peer that was asked on behalf of the caller
	}
	return errgrpc.ToGRPC(&flat{err.Error(), errdefs.Resolve(err)})
}

// flat has the message and the class of an error and nothing else that it
// wraps: errgrpc v0.3.0 walks the whole tree for details and panics at a
// branch that ends with Unwrap() == nil.
type flat struct {
	message string
	class   error
}

func (f *flat) Error() string { return f.message }
func (f *flat) Unwrap() error { return f.class }
