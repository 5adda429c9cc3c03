// Package wireerr carries the class of an error (containerd/errdefs) over
// ttrpc: a server's interceptor makes it a status code, a client's makes that
// the class again. Messages stay as they are. Everything between the two uses
// ordinary errors.
package wireerr

import (
	"context"

	"github.com/containerd/errdefs"
	"github.com/containerd/ttrpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Server is the interceptor of a server.
func Server(ctx context.Context, unmarshal ttrpc.Unmarshaler, _ *ttrpc.UnaryServerInfo, method ttrpc.Method) (any, error) {
	resp, err := method(ctx, unmarshal)
	if err != nil {
		return nil, toStatus(err)
	}
	return resp, nil
}

// Client is the interceptor of a client. Errors that are no answer of the
// server, as ttrpc.ErrClosed, pass through.
func Client(ctx context.Context, req *ttrpc.Request, resp *ttrpc.Response, _ *ttrpc.UnaryClientInfo, call ttrpc.Invoker) error {
	if err := call(ctx, req, resp); err != nil {
		return FromStatus(err)
	}
	if resp.Status != nil && codes.Code(resp.Status.Code) != codes.OK {
		return FromStatus(status.ErrorProto(resp.Status))
	}
	return nil
}

// pair is a code and the class of errors that it stands for.
type pair struct {
	code  codes.Code
	class error
}

// pairs are those of containerd/errdefs/pkg/errgrpc, which other peers use. That
// package itself stays out: v0.3.0 walks everything that an error wraps, for
// details, and panics where an Unwrap returns nil.
func pairs() []pair {
	return []pair{
		{codes.InvalidArgument, errdefs.ErrInvalidArgument},
		{codes.NotFound, errdefs.ErrNotFound},
		{codes.AlreadyExists, errdefs.ErrAlreadyExists},
		{codes.PermissionDenied, errdefs.ErrPermissionDenied},
		{codes.ResourceExhausted, errdefs.ErrResourceExhausted},
		{codes.FailedPrecondition, errdefs.ErrFailedPrecondition},
		{codes.FailedPrecondition, errdefs.ErrConflict},
		{codes.Aborted, errdefs.ErrAborted},
		{codes.OutOfRange, errdefs.ErrOutOfRange},
		{codes.Unimplemented, errdefs.ErrNotImplemented},
		{codes.Internal, errdefs.ErrInternal},
		{codes.Unavailable, errdefs.ErrUnavailable},
		{codes.DataLoss, errdefs.ErrDataLoss},
		{codes.Unauthenticated, errdefs.ErrUnauthenticated},
		{codes.DeadlineExceeded, context.DeadlineExceeded},
		{codes.Canceled, context.Canceled},
	}
}

func toStatus(err error) error {
	if _, ok := status.FromError(err); ok {
		return err // of a peer that was asked on behalf of the caller
	}
	class := errdefs.Resolve(err)
	for _, p := range pairs() {
		if p.class == class { //nolint:errorlint // Resolve returns one of these values
			return status.Error(p.code, err.Error())
		}
	}
	return status.Error(codes.Unknown, err.Error())
}

// FromStatus gives the error of a ttrpc call its class back.
func FromStatus(err error) error {
	s, ok := status.FromError(err)
	if !ok || err == nil {
		return err
	}
	for _, p := range pairs() {
		if p.code == s.Code() {
			return &remote{s.Message(), p.class}
		}
	}
	return &remote{s.Message(), errdefs.ErrUnknown}
}

// remote is an error of a peer, in its words.
type remote struct {
	message string
	class   error
}

func (r *remote) Error() string { return r.message }
func (r *remote) Unwrap() error { return r.class }
