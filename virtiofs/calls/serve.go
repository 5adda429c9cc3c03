package calls

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/protocols/rights"
)

// receive takes messages until the connection is lost.
func (c *Conn) receive() {
	for {
		m, files, err := c.read()
		if err == nil {
			err = c.take(m, files)
		}
		if err == nil {
			continue
		}
		if !errors.Is(err, io.EOF) {
			err = fmt.Errorf("%w: %w", ErrLost, err)
		} else {
			err = ErrLost
		}
		c.lost(err)
		return
	}
}

// read receives one message.
func (c *Conn) read() (message, []*os.File, error) {
	buf, oob := make([]byte, maxMessage), make([]byte, unix.CmsgSpace(4*maxFiles))
	n, oobn, flags, _, err := c.conn.ReadMsgUnix(buf, oob)
	files, ferr := rights.Files(oob[:oobn], "received")
	switch {
	case err != nil || ferr != nil:
		err = errors.Join(err, ferr)
	case n == 0:
		err = io.EOF
	case flags&(unix.MSG_TRUNC|unix.MSG_CTRUNC) != 0:
		err = fmt.Errorf("message of more than %d bytes or %d descriptors", maxMessage, maxFiles)
	}
	var m message
	if err == nil {
		err = json.Unmarshal(buf[:n], &m)
	}
	if err != nil {
		closeAll(files)
		return m, nil, err
	}
	return m, files, nil
}

// take hands a message to who waits for it. An error ends the connection.
func (c *Conn) take(m message, files []*os.File) error {
	c.mu.Lock()
	defer c.mu.Unlock()
	if m.Op == "" {
		if got := c.waiting[m.ID]; got != nil {
			delete(c.waiting, m.ID)
			got <- answer{m, files}
		} else {
			closeAll(files) // the caller has given up
		}
		return nil
	}
	// The other side counts as well. To wait here would stop the answers, for
	// which the handlers may wait.
	if c.serving == maxCalls || c.handle == nil {
		closeAll(files)
		return fmt.Errorf("call of %q: %d calls are under way", m.Op, c.serving)
	}
	c.serving++
	c.ended.Go(func() { c.serve(m, files) })
	return nil
}

// serve answers one call.
func (c *Conn) serve(m message, files []*os.File) {
	result, out, err := c.handle(c.ctx, m.Op, m.Data, files)
	defer closeAll(out)
	reply := message{ID: m.ID, Error: fail(err)}
	if err == nil {
		if reply.Data, err = json.Marshal(result); err != nil {
			reply.Error = fail(err)
		}
	}
	// Before the answer: the caller may use the place at once.
	c.mu.Lock()
	c.serving--
	c.mu.Unlock()
	if err := c.send(reply, out); err != nil {
		c.lost(fmt.Errorf("%w: answer to %s: %w", ErrLost, m.Op, err)) // also one that is too long
	}
}

// send writes one message.
func (c *Conn) send(m message, files []*os.File) error {
	b, err := json.Marshal(m)
	if err != nil {
		return fmt.Errorf("encode message: %w", err)
	}
	if len(b) > maxMessage || len(files) > maxFiles {
		return fmt.Errorf("send %q: %d bytes (at most %d), %d descriptors (at most %d)", m.Op, len(b), maxMessage, len(files), maxFiles)
	}
	c.writeMu.Lock()
	defer c.writeMu.Unlock()
	err = c.conn.SetWriteDeadline(time.Now().Add(c.stall))
	if err == nil {
		err = c.write(b, files)
	}
	if err != nil {
		err = fmt.Errorf("%w: send %q: %w", ErrLost, m.Op, err)
		c.lost(err)
	}
	return err
}

// write holds the descriptors open while it sends them. Precondition: writeMu is
// held.
func (c *Conn) write(b []byte, files []*os.File) error {
	fds := make([]int, 0, len(files))
	var control func(files []*os.File) error
	control = func(files []*os.File) error {
		if len(files) == 0 {
			var oob []byte
			if len(fds) > 0 {
				oob = unix.UnixRights(fds...)
			}
			_, _, err := c.conn.WriteMsgUnix(b, oob, nil)
			return err
		}
		rc, err := files[0].SyscallConn()
		if err != nil {
			return err
		}
		var inner error
		err = rc.Control(func(fd uintptr) {
			fds = append(fds, int(fd))
			inner = control(files[1:])
		})
		return errors.Join(err, inner)
	}
	return control(files)
}
