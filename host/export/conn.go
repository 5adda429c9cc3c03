package export

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// conn is the connection of one device.
type conn struct {
	s       *Server
	wire    *sharedimages.Conn
	sandbox string
	log     *slog.Logger
	slots   chan struct{} // of the sandbox
	room    chan struct{} // one element for each request that is not answered
	ctx     context.Context
	cancel  context.CancelFunc
	wg      sync.WaitGroup // requests, and events

	mu    sync.Mutex
	ended bool                          // nothing begins any more; protected by mu
	calls map[uint32]context.CancelFunc // requests by ID; protected by mu
	opens map[uint32]*open              // by handle; protected by mu
	last  uint32                        // handle; protected by mu
	era   int                           // changes when the handles are taken away; protected by mu
}

// open is an image that the device has open.
type open struct {
	Image
	manifest digest.Digest
	desc     sharedimages.Opened
	ctx      context.Context // of reads; ends when the sandbox is over
	cancel   context.CancelFunc
	closed   chan struct{} // closed when the image is

	refs int // the handle and its users; protected by conn.mu
}

// run answers until the device leaves, which has no error.
func (c *conn) run(buf []byte) error {
	for {
		h, payload, _, err := c.wire.Receive(buf, false)
		switch {
		case err != nil:
			return err
		case h.Op == sharedimages.Bye:
			return nil
		case h.Op == sharedimages.Cancel:
			c.cancelCall(h.ID)
		default:
			err = c.request(h, payload)
		}
		if err != nil {
			return err
		}
	}
}

// request begins one. The error is of a device that breaks the rules.
func (c *conn) request(h sharedimages.Header, payload []byte) error {
	do, err := c.work(h, payload)
	if err != nil {
		return err
	}
	select {
	case c.room <- struct{}{}:
	case <-c.ctx.Done():
		return c.ctx.Err()
	}
	ctx, cancel := context.WithCancel(c.ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	if _, busy := c.calls[h.ID]; busy {
		cancel()
		return fmt.Errorf("request %d twice: %w", h.ID, errdefs.ErrInvalidArgument)
	}
	c.calls[h.ID] = cancel
	c.wg.Go(func() {
		defer func() { <-c.room }()
		defer cancel()
		do(ctx)
	})
	return nil
}

// work is what a request asks for; the payload lasts only until it returns.
func (c *conn) work(h sharedimages.Header, payload []byte) (func(context.Context), error) {
	switch h.Op {
	case sharedimages.Open:
		manifest, err := sharedimages.ParseManifest(payload)
		return func(context.Context) { c.open(h, manifest) }, err
	case sharedimages.Share:
		return func(context.Context) { c.share(h) }, nil
	case sharedimages.Read:
		return func(ctx context.Context) { c.read(ctx, h) }, nil
	case sharedimages.Close:
		return func(context.Context) { c.answer(sharedimages.Header{Op: h.Op, ID: h.ID}, nil, c.close(h.Handle)) }, nil
	}
	return nil, fmt.Errorf("message %d is none of a device: %w", h.Op, errdefs.ErrInvalidArgument)
}

// answer ends a request. That a device does not take it is found by run. At the end
// of the connection there is no answer: what was broken off is asked for on the next
// one, while an error would be the guest's.
func (c *conn) answer(h sharedimages.Header, payload []byte, err error, files ...*os.File) {
	c.mu.Lock()
	delete(c.calls, h.ID)
	c.mu.Unlock()
	if c.ctx.Err() != nil {
		return
	}
	if err != nil {
		h = sharedimages.Header{Op: h.Op, ID: h.ID}
		payload, files = h.Fail(err), nil
	}
	_ = c.wire.Send(&h, payload, files...)
}

func (c *conn) cancelCall(id uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if cancel := c.calls[id]; cancel != nil { // else its answer is on its way
		cancel()
	}
}

func (c *conn) open(h sharedimages.Header, manifest digest.Digest) {
	h = sharedimages.Header{Op: h.Op, ID: h.ID}
	era := c.now()
	img, err := c.s.cfg.Open(c.sandbox, manifest)
	if err != nil {
		c.answer(h, nil, err)
		return
	}
	desc := img.Describe()
	boot, payload, err := describe(img, &desc)
	if err != nil {
		img.Close()
		c.answer(h, nil, err)
		return
	}
	defer boot.Close()
	o := &open{Image: img, manifest: manifest, desc: desc, closed: make(chan struct{}), refs: 1}
	o.ctx, o.cancel = context.WithCancel(c.ctx)
	if h.Handle, err = c.install(o, era); err != nil {
		c.release(o)
	}
	c.answer(h, payload, err, boot)
}

func describe(img Image, desc *sharedimages.Opened) (*os.File, []byte, error) {
	payload, err := desc.Encode()
	if err != nil {
		return nil, nil, err
	}
	boot, err := img.Boot()
	if err == nil {
		boot, err = seal(boot)
	}
	return boot, payload, err
}

func (c *conn) now() int {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.era
}

// install gives an image a handle, unless its era is over.
func (c *conn) install(o *open, era int) (uint32, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended || c.era != era {
		return 0, fmt.Errorf("image %s is not granted any more: %w", o.manifest, errdefs.ErrNotFound)
	}
	if len(c.opens) >= maxOpens {
		return 0, fmt.Errorf("%d images are open: %w", maxOpens, errdefs.ErrResourceExhausted)
	}
	for c.last++; c.last == 0 || c.opens[c.last] != nil; c.last++ {
	}
	c.opens[c.last] = o
	return c.last, nil
}

// use finds an image that is open, and holds it until release.
func (c *conn) use(handle uint32) (*open, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	o := c.opens[handle]
	if o == nil {
		return nil, notOpen(handle)
	}
	o.refs++
	return o, nil
}

func notOpen(handle uint32) error {
	return fmt.Errorf("handle %d is not open: %w", handle, errdefs.ErrNotFound)
}

func (c *conn) release(o *open) {
	c.mu.Lock()
	o.refs--
	last := o.refs == 0
	c.mu.Unlock()
	if last {
		o.cancel()
		o.Close()
		close(o.closed)
	}
}

func (c *conn) close(handle uint32) error {
	c.mu.Lock()
	o := c.opens[handle]
	delete(c.opens, handle)
	c.mu.Unlock()
	if o == nil {
		return notOpen(handle)
	}
	c.release(o)
	return nil
}

func (c *conn) share(h sharedimages.Header) {
	state, data, off, err := c.segment(h.Handle, int64(h.N))
	h = sharedimages.Header{Op: h.Op, ID: h.ID, N: h.N, Off: off}
	if err != nil {
		c.answer(h, nil, err)
		return
	}
	defer state.Close()
	defer data.Close()
	c.answer(h, nil, nil, state, data)
}

func (c *conn) segment(handle uint32, k int64) (state, data *os.File, off int64, err error) {
	o, err := c.use(handle)
	if err != nil {
		return nil, nil, 0, err
	}
	defer c.release(o)
	if n := len(o.desc.Segments); k >= int64(n) {
		return nil, nil, 0, fmt.Errorf("segment %d of %d: %w", k, n, errdefs.ErrInvalidArgument)
	}
	if state, data, off, err = o.Share(int(k)); err != nil {
		return nil, nil, 0, err
	}
	if state, err = seal(state); err != nil {
		return nil, nil, 0, errors.Join(err, data.Close())
	}
	if data, err = seal(data); err != nil {
		return nil, nil, 0, errors.Join(err, state.Close())
	}
	return state, data, off, nil
}

// maxTurn is how long a device may take for an answer while others wait for theirs.
const maxTurn = 20 * time.Millisecond

// buffers are for reads, of sharedimages.MaxData bytes.
var buffers = sync.Pool{New: func() any { return new([sharedimages.MaxData]byte) }}

func (c *conn) read(ctx context.Context, h sharedimages.Header) {
	answer := sharedimages.Header{Op: h.Op, ID: h.ID}
	select {
	case c.slots <- struct{}{}:
		defer func() { <-c.slots }()
	case <-ctx.Done():
		c.answer(answer, nil, ctx.Err())
		return
	}
	buf := buffers.Get().(*[sharedimages.MaxData]byte)
	defer buffers.Put(buf)
	n, leave, err := c.readAt(ctx, buf, h)
	defer leave()
	answer.N = uint32(n)
	c.answer(answer, buf[:n], err)
}

// readAt reads what a request asks for, all or nothing, and waits for the turn to send
// it, which leave ends.
func (c *conn) readAt(ctx context.Context, buf *[sharedimages.MaxData]byte, h sharedimages.Header) (n int, leave func(), err error) {
	leave = func() {}
	o, err := c.use(h.Handle)
	if err != nil {
		return 0, leave, err
	}
	defer c.release(o)
	ctx = sched.With(ctx, sched.NewWork(sched.Standing{Flow: o.Flow()}))
	if n, err = o.read(ctx, buf, h); err != nil {
		return 0, leave, err
	}
	if end, err := c.s.cfg.Queue.Brief(ctx, maxTurn); err == nil {
		leave = end
	} // else nobody waits for the answer
	return n, leave, nil
}

// read reads what a request asks for, all or nothing.
func (o *open) read(ctx context.Context, buf *[sharedimages.MaxData]byte, h sharedimages.Header) (int, error) {
	n := int64(h.N)
	if n > sharedimages.MaxData || h.Off > o.desc.Size || n > o.desc.Size-h.Off {
		return 0, fmt.Errorf("read %d bytes at %d of an image of %d: %w", n, h.Off, o.desc.Size, errdefs.ErrInvalidArgument)
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	defer context.AfterFunc(o.ctx, cancel)()
	got, err := o.ReadAt(ctx, buf[:n], h.Off)
	switch {
	case int64(got) == n:
		return got, nil
	case o.ctx.Err() != nil:
		return 0, notOpen(h.Handle)
	}
	return 0, errors.Join(err, io.ErrUnexpectedEOF)
}

// gone tells the device of an image, if that has it open.
func (c *conn) gone(manifest digest.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, o := range c.opens {
		if o.manifest == manifest {
			c.tell(manifest)
			return
		}
	}
}

// tell sends Gone beside. Precondition: mu is held.
func (c *conn) tell(manifest digest.Digest) {
	if c.ended {
		return
	}
	c.wg.Go(func() {
		_ = c.wire.Send(&sharedimages.Header{Op: sharedimages.Gone}, []byte(manifest)) // run finds that it failed
	})
}

// drop takes all handles away and waits until nobody reads their images.
func (c *conn) drop() {
	opens := c.takeOpens(false)
	for _, o := range opens {
		o.cancel()
		c.release(o)
	}
	for _, o := range opens {
		<-o.closed
	}
}

// takeOpens takes all handles away, and tells the device unless it is the end.
func (c *conn) takeOpens(end bool) []*open {
	c.mu.Lock()
	defer c.mu.Unlock()
	var all []*open
	for _, o := range c.opens {
		all = append(all, o)
		if !end {
			c.tell(o.manifest)
		}
	}
	clear(c.opens)
	c.era++
	c.ended = c.ended || end
	return all
}

// end breaks off what is under way and closes the images.
func (c *conn) end() {
	c.cancel()
	opens := c.takeOpens(true)
	_ = c.wire.Close() // ends what is being sent
	c.wg.Wait()
	for _, o := range opens {
		c.release(o)
	}
}
