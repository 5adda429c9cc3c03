package virtiofs

import (
	"context"
	"sync"
	"syscall"
	"time"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
)

// drainTime is how long a guest that leaves waits for the reads of a queue; the VMM
// stands still meanwhile.
const drainTime = time.Second

// call is one request on its way, with what it needs of memory.
type call struct {
	chain vhostuser.Chain
	msg   [maxRequest]byte
	// Scratch of a transfer: the guest's buffers, and what of them one preadv fills.
	bufs, iov [][]byte
}

// worker serves one run of one queue.
type worker struct {
	*device
	q       *vhostuser.Queue
	ctx     context.Context // of reads that wait; done when they are cut short
	cancel  context.CancelFunc
	waiting sync.WaitGroup
	reply   [outHeaderSize + maxReaddir]byte // of metadata
}

// Serve implements vhostuser.Device. Metadata and what is in the page cache is
// answered on the spot, other reads beside.
func (d *device) Serve(_ int, q *vhostuser.Queue) {
	w := &worker{device: d, q: q}
	w.ctx, w.cancel = context.WithCancel(context.Background())
	defer w.finish()
	for {
		c := d.calls.Get().(*call)
		ok, err := q.Pop(&c.chain)
		if err != nil {
			return // the server has told the owner
		}
		if ok {
			w.handle(c)
			continue
		}
		d.calls.Put(c)
		if !q.Wait() {
			return
		}
	}
}

// finish gives back what waits. A driver that wants answers gets those that come
// soon.
func (w *worker) finish() {
	patience := time.AfterFunc(drainTime, w.cancel)
	defer patience.Stop()
	if !w.q.Draining() {
		w.cancel()
	}
	w.waiting.Wait()
	w.cancel()
}

func (w *worker) handle(c *call) {
	total := vhostuser.Len(c.chain.Readable)
	c.bufs = append(c.bufs[:0], c.chain.Readable...) // CopyOut moves them
	n, _ := vhostuser.CopyOut(c.msg[:], c.bufs)
	r, ok := parseRequest(c.msg[:n], total)
	if !ok {
		w.push(c, 0)
		return
	}
	r.sub = w.tree.find(r.node)
	switch {
	case r.opcode == opInit || r.opcode == opDestroy:
		w.answer(c, &r)
	case r.kind == unheard:
		w.forget(c, &r)
	case w.target(&r) != nil:
		w.file(c, &r)
	default:
		w.image(c, &r)
	}
}

// image answers a request for an image or a directory of the tree.
func (w *worker) image(c *call, r *request) {
	switch {
	case r.sub == nil && (r.kind == data || w.tree.own(r.node) == nil):
		w.fail(c, r.unique, syscall.ESTALE)
	case r.kind == data:
		w.read(c, r)
	case r.kind == metadata:
		w.answer(c, r)
	case r.kind == readOnly:
		w.fail(c, r.unique, syscall.EROFS)
	default:
		w.fail(c, r.unique, imageErrno(r.opcode, w.mixed, w.cfg.XAttr))
	}
}

// answer has go-fuse answer a request of metadata on the spot.
func (w *worker) answer(c *call, r *request) {
	if errno := r.check(); errno != 0 {
		w.fail(c, r.unique, errno)
		return
	}
	s := w.session.Load()
	if r.opcode == opInit {
		s = w.newSession()
	}
	if s == nil {
		w.fail(c, r.unique, syscall.EIO) // before any INIT
		return
	}
	if r.opcode == opInit || r.opcode == opDestroy {
		w.reset()
	}
	n, st := s.HandleRequest([][]byte{r.msg}, [][]byte{w.reply[:]})
	if n < outHeaderSize || int64(n) > vhostuser.Len(c.chain.Writable) {
		w.fail(c, r.unique, syscall.EIO)
		return
	}
	if r.opcode == opInit && st.Ok() {
		w.session.Store(s)
		w.sessions.Add(1)
		if w.cfg.Began != nil {
			w.cfg.Began(r.msg)
		}
	}
	vhostuser.CopyIn(c.chain.Writable, w.reply[:n])
	w.push(c, n)
}

// fail answers without a payload. A guest that left no room for that hears nothing.
func (w *worker) fail(c *call, unique uint64, errno syscall.Errno) {
	var b [outHeaderSize]byte
	putHeader(&b, unique, errno, 0)
	n, _ := vhostuser.CopyIn(c.chain.Writable, b[:])
	w.push(c, n)
}

// push ends a call; n bytes of its buffers were written.
func (w *worker) push(c *call, n int) {
	w.q.Push(&c.chain, n)
	w.q.Notify()
	w.calls.Put(c)
}
