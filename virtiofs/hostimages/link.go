package hostimages

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
)

// stall is how long tatami-host may not take a request.
const stall = 30 * time.Second

// errLost is of a request that has no answer because its connection is gone. It may
// be made again on another one.
var errLost = fmt.Errorf("the connection to tatami-host is lost: %w", errdefs.ErrUnavailable)

// link is one connection.
type link struct {
	wire  *sharedimages.Conn
	began time.Time
	room  chan struct{} // one element for each request without an answer
	done  chan struct{} // closed when no answer comes any more
	wg    sync.WaitGroup

	mu    sync.Mutex
	last  uint32           // ID; protected by mu
	calls map[uint32]*call // protected by mu
}

// call is a request on its way.
type call struct {
	op     sharedimages.Op
	dst    []byte // of a read; protected by link.mu until the answer is there
	answer chan answer
}

// answer is what a call got; files are the receiver's.
type answer struct {
	sharedimages.Header
	payload []byte // a copy; of a read only the text of a failure
	files   []*os.File
}

// filesOf is how many descriptors come with a good answer.
var filesOf = map[sharedimages.Op]int{sharedimages.Open: 1, sharedimages.Share: 2}

func newLink(c *net.UnixConn) (*link, error) {
	wire, err := sharedimages.NewConn(c, stall)
	if err != nil {
		return nil, err
	}
	return &link{wire: wire, began: time.Now(), room: make(chan struct{}, sharedimages.MaxCalls), done: make(chan struct{}), calls: map[uint32]*call{}}, nil
}

// do makes a request and waits for its answer; the data of a read goes to dst. The
// error is errLost, ctx's, or what tatami-host answered. When it returns, dst is
// the caller's alone.
func (l *link) do(ctx context.Context, h sharedimages.Header, payload, dst []byte) (answer, error) {
	select {
	case l.room <- struct{}{}:
	case <-l.done:
		return answer{}, errLost
	case <-ctx.Done():
		return answer{}, ctx.Err()
	}
	c := &call{op: h.Op, dst: dst, answer: make(chan answer, 1)}
	h.ID = l.register(c)
	if err := l.wire.Send(&h, payload); err != nil { // also ends receive
		<-l.done
		return answer{}, errors.Join(errLost, err)
	}
	select {
	case a := <-c.answer:
		return a, a.Err(a.payload)
	case <-l.done:
		return l.late(c)
	case <-ctx.Done():
	}
	if !l.abandon(h.ID) {
		a := <-c.answer // was sent before
		return a, a.Err(a.payload)
	}
	return answer{}, ctx.Err()
}

// late looks for an answer that came before the end.
func (l *link) late(c *call) (answer, error) {
	select {
	case a := <-c.answer:
		return a, a.Err(a.payload)
	default:
		return answer{}, errLost
	}
}

func (l *link) register(c *call) uint32 {
	l.mu.Lock()
	defer l.mu.Unlock()
	for l.last++; l.last == 0 || l.calls[l.last] != nil; l.last++ {
	}
	l.calls[l.last] = c
	return l.last
}

// abandon says that nobody waits for an answer any more, and tells tatami-host. It
// is false when the answer is there.
func (l *link) abandon(id uint32) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.calls[id]
	if c == nil {
		return false
	}
	c.dst, c.answer = nil, nil
	select {
	case <-l.done:
	default:
		l.wg.Go(func() { _ = l.wire.Send(&sharedimages.Header{Op: sharedimages.Cancel, ID: id}, nil) }) // receive finds that it failed
	}
	return true
}

// receive delivers answers until the connection ends.
func (l *link) receive(gone func(digest.Digest)) error {
	buf := make([]byte, sharedimages.MaxPacket)
	for {
		h, payload, files, err := l.wire.Receive(buf, true)
		if err != nil {
			return err
		}
		if h.Op == sharedimages.Gone {
			err = event(payload, files, gone)
		} else {
			err = l.deliver(h, payload, files)
		}
		if err != nil {
			closeAll(files)
			return err
		}
	}
}

func event(payload []byte, files []*os.File, gone func(digest.Digest)) error {
	manifest, err := sharedimages.ParseManifest(payload)
	if err == nil && len(files) > 0 {
		err = fmt.Errorf("an event with descriptors: %w", errdefs.ErrInvalidArgument)
	}
	if err == nil {
		gone(manifest)
	}
	return err
}

// deliver hands an answer over. The error is of an answer that is none.
func (l *link) deliver(h sharedimages.Header, payload []byte, files []*os.File) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	c := l.calls[h.ID]
	want := 0
	if h.Status == 0 {
		want = filesOf[h.Op]
	}
	if c == nil || c.op != h.Op || len(files) != want {
		return fmt.Errorf("answer %+v with %d descriptors to no such request: %w", h, len(files), errdefs.ErrInvalidArgument)
	}
	delete(l.calls, h.ID)
	<-l.room
	switch {
	case c.answer == nil: // nobody waits
		closeAll(files)
		if h.Op == sharedimages.Open && h.Status == 0 {
			l.wg.Go(func() { l.giveBack(h.Handle) })
		}
		return nil
	case h.Op == sharedimages.Read && h.Status == 0:
		h.N = uint32(copy(c.dst, payload))
		payload = nil
	}
	c.answer <- answer{Header: h, payload: append([]byte(nil), payload...), files: files}
	return nil
}

// giveBack closes the handle of an image that was opened for nobody. It is bounded by
// the end of the link.
func (l *link) giveBack(handle uint32) {
	_, _ = l.do(context.Background(), sharedimages.Header{Op: sharedimages.Close, Handle: handle}, nil, nil) // it may be lost already
}

// byeTime bounds the farewell.
const byeTime = time.Second

// leave ends the connection in order, which ends receive.
func (l *link) leave() {
	patience := time.AfterFunc(byeTime, func() { _ = l.wire.Close() }) // ends Send
	defer patience.Stop()
	_ = l.wire.Send(&sharedimages.Header{Op: sharedimages.Bye}, nil) // it may be lost already
	_ = l.wire.Close()
}

// end closes the connection; all requests without an answer are lost.
// Precondition: receive has returned.
func (l *link) end() {
	_ = l.wire.Close() // it may be closed
	l.mu.Lock()
	close(l.done)
	l.mu.Unlock()
	l.wg.Wait()
}

func closeAll(files []*os.File) {
	for _, f := range files {
		_ = f.Close() // only read
	}
}
