package registry

import (
	"context"
	"net/http"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// allowance is what has to be asked for before bytes of an answer are read. It has the
// one user that reads the answer. A nil allowance allows everything.
type allowance struct {
	ctx  context.Context // of the request
	up   *sched.Upstream
	left int64 // bytes that may still come; -1 when not known
}

// newAllowance is that of an answer; it counts for the host that gave it, which a
// redirect may have led to.
func newAllowance(ctx context.Context, s *sched.Scheduler, resp *http.Response) *allowance {
	up := s.Upstream(resp.Request.URL.Host)
	if up == nil {
		return nil
	}
	return &allowance{ctx: ctx, up: up, left: resp.ContentLength}
}

// read waits until some of p may be read, and reads so much of it. waited is called in
// between. Behind its end an answer is read for the end only, which takes nothing.
func (a *allowance) read(p []byte, waited func(), read func([]byte) (int, error)) (int, error) {
	if a == nil || a.left == 0 || len(p) == 0 {
		waited()
		return read(p)
	}
	if a.left > 0 {
		p = p[:min(int64(len(p)), a.left)]
	}
	resume := hold(a.ctx)
	grant, err := a.up.Receive(a.ctx, len(p))
	resume()
	if err != nil {
		return 0, context.Cause(a.ctx)
	}
	waited()
	n, err := read(p[:grant.N])
	a.up.Received(grant, n)
	if a.left > 0 {
		a.left -= int64(n)
	}
	return n, err
}
