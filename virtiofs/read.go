package virtiofs

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"syscall"
	"time"

	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
	"golang.org/x/sys/unix"
)

// complainEvery is how often failed reads of one file are logged, in seconds.
const complainEvery = 60

// piece is how many bytes ReadAt is asked for at a time: what lies behind them may
// be mapped then.
const piece = 128 << 10

// maxIovec is IOV_MAX of Linux.
const maxIovec = 1024

// transfer is one READ: n bytes at off of a file go to buffers of the guest.
type transfer struct {
	*call
	unique uint64
	node   *node
	off, n int64
	done   int64
	room   [][]byte // for what is left
}

// read answers a READ at once if its bytes are in the page cache.
func (w *worker) read(c *call, r *request) {
	t, errno := w.transfer(c, r)
	if errno != 0 {
		w.fail(c, r.unique, errno)
		return
	}
	if t.mapped(unix.RWF_NOWAIT) == nil && t.done == t.n {
		w.direct.Add(1)
		w.succeed(t)
		return
	}
	select {
	case w.slots <- struct{}{}:
	case <-t.node.gone.Done(): // Remove waits for this read, and others' need not end before
		w.end(t, syscall.EIO)
		return
	case <-w.q.Halted():
		w.giveUp(t)
		return
	}
	w.waiting.Go(func() {
		defer func() { <-w.slots }()
		w.wait(t)
	})
}

// transfer checks a READ. When it succeeds, the node is entered.
func (w *worker) transfer(c *call, r *request) (*transfer, syscall.Errno) {
	off, n, errno := r.readRange()
	if errno != 0 {
		return nil, errno
	}
	room := vhostuser.Len(c.chain.Writable) - outHeaderSize
	if room < n {
		return nil, syscall.EINVAL
	}
	f := r.sub.images.enter(r.node & localMask)
	if f == nil {
		return nil, syscall.ESTALE
	}
	c.bufs = append(c.bufs[:0], c.chain.Writable...)
	return &transfer{call: c, unique: r.unique, node: f, off: off, n: max(0, min(n, f.size-off)),
		room: skip(c.bufs, outHeaderSize)}, 0
}

// wait answers a READ that may have to wait for its bytes.
func (w *worker) wait(t *transfer) {
	ctx, cancel := context.WithCancel(w.ctx)
	defer cancel()
	stop := context.AfterFunc(t.node.gone, cancel)
	defer stop()
	err := t.mapped(0)
	for err == nil && t.done < t.n {
		if err = t.copied(ctx, w.buffers); err == nil {
			err = t.mapped(0)
		}
	}
	switch {
	case err == nil:
		w.succeed(t)
	case w.ctx.Err() != nil:
		w.giveUp(t)
	default:
		w.complain(t, err)
		w.end(t, syscall.EIO)
	}
}

// mapped moves what lies in open files, up to the first byte that does not, or not
// any more. The error is that of preadv2(2), EAGAIN when it would have to wait for
// the disk.
func (t *transfer) mapped(flags int) error {
	m, ok := t.node.file.(Mapper)
	for ok && t.done < t.n {
		off := t.off + t.done
		f, at, n, stamp := m.Map(off)
		if n <= 0 {
			return nil
		}
		got, err := t.preadv(f, at, min(n, t.n-t.done), flags)
		if !m.Valid(off, stamp) {
			return nil
		}
		if err != nil {
			return err
		}
		t.done += int64(got)
		t.room = skip(t.room, got)
	}
	return nil
}

// preadv moves up to n bytes from at of f to the guest.
func (t *transfer) preadv(f *os.File, at, n int64, flags int) (got int, err error) {
	t.iov = first(t.iov[:0], t.room, n)
	conn, err := f.SyscallConn() // holds f open
	if err != nil {
		return 0, err
	}
	cerr := conn.Control(func(fd uintptr) {
		for {
			if got, err = unix.Preadv2(int(fd), t.iov, at, flags); !errors.Is(err, unix.EINTR) {
				return
			}
		}
	})
	switch {
	case cerr != nil:
		return 0, cerr
	case err != nil:
		return 0, fmt.Errorf("read %s at %d: %w", f.Name(), at, err)
	case got == 0:
		return 0, fmt.Errorf("read %s at %d: %w: the file was cut", f.Name(), at, io.ErrUnexpectedEOF)
	}
	return got, nil
}

// copied moves the next piece through private memory.
func (t *transfer) copied(ctx context.Context, b *buffers) error {
	buf, err := b.get(ctx, int(min(t.n-t.done, piece)))
	if err != nil {
		return err
	}
	defer b.put(buf)
	got, err := t.node.file.ReadAt(ctx, buf, t.off+t.done)
	if got < len(buf) {
		return errors.Join(err, io.ErrUnexpectedEOF)
	}
	_, t.room = vhostuser.CopyIn(t.room, buf)
	t.done += int64(len(buf))
	return nil
}

// giveUp ends a READ whose queue is halted.
func (w *worker) giveUp(t *transfer) {
	if w.q.Draining() {
		w.end(t, syscall.EIO)
		return
	}
	t.node.leave()
	w.q.Keep(&t.chain)
	w.calls.Put(t.call)
}

func (w *worker) succeed(t *transfer) {
	w.reads.Add(1)
	w.readBytes.Add(t.n)
	t.node.leave()
	var b [outHeaderSize]byte
	putHeader(&b, t.unique, 0, int(t.n))
	vhostuser.CopyIn(t.chain.Writable, b[:])
	w.push(t.call, outHeaderSize+int(t.n))
}

func (w *worker) end(t *transfer, errno syscall.Errno) {
	w.failures.Add(1)
	t.node.leave()
	w.fail(t.call, t.unique, errno)
}

// complain logs the first failure of a file, and one a minute after that: a dead
// registry fails thousands of reads a second.
func (w *worker) complain(t *transfer, err error) {
	now, last := time.Now().Unix(), t.node.complained.Load()
	if now-last < complainEvery || !t.node.complained.CompareAndSwap(last, now) || t.node.gone.Err() != nil {
		return
	}
	w.log.Error("read of image failed; the guest gets EIO and may try again", "file", t.node.name, "off", t.off, "n", t.n, "err", err)
}

// skip drops the first n bytes of bufs, whose slices it moves. Precondition: bufs
// have that many.
func skip(bufs [][]byte, n int) [][]byte {
	for len(bufs) > 0 && n >= len(bufs[0]) {
		n -= len(bufs[0])
		bufs = bufs[1:]
	}
	if n > 0 {
		bufs[0] = bufs[0][n:]
	}
	return bufs
}

// first appends to dst the first n bytes of bufs, or what fits in one system call.
func first(dst, bufs [][]byte, n int64) [][]byte {
	for _, b := range bufs {
		if n == 0 || len(dst) == maxIovec {
			break
		}
		b = b[:min(int64(len(b)), n)]
		n -= int64(len(b))
		dst = append(dst, b)
	}
	return dst
}
