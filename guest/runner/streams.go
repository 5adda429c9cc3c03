package runner

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
)

// stream is one of a container's standard streams.
type stream int

const (
	stdin stream = iota
	stdout
	stderr
	streamCount
)

func (s stream) String() string { return [...]string{"stdin", "stdout", "stderr"}[s] }

const (
	// maxHello bounds the line that a connection begins with: an id, a space,
	// a stream, a line feed.
	maxHello     = 128 + 1 + 6 + 1
	helloTimeout = 10 * time.Second
)

// ServeStreams takes connections on the stream port until ctx ends, and
// returns when it has let go of them.
func (r *Runner) ServeStreams(ctx context.Context, l net.Listener) error {
	var greeters sync.WaitGroup
	defer greeters.Wait()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, func() { _ = l.Close() })
	defer stop()
	for {
		conn, err := l.Accept()
		if ctx.Err() != nil {
			return nil
		}
		if err != nil {
			return fmt.Errorf("accept on the stream port: %w", err)
		}
		greeters.Go(func() {
			if err := r.greet(ctx, conn); err != nil {
				r.cfg.Log.Warn("stream refused", "error", err)
				_ = conn.Close() // refused already
			}
		})
	}
}

// greet reads the first line of a connection and hands it to its container.
func (r *Runner) greet(ctx context.Context, conn net.Conn) error {
	defer context.AfterFunc(ctx, func() { _ = conn.SetReadDeadline(time.Unix(1, 0)) })()
	if err := conn.SetReadDeadline(time.Now().Add(helloTimeout)); err != nil {
		return err
	}
	id, s, err := readHello(conn)
	if err != nil {
		return err
	}
	if err := conn.SetReadDeadline(time.Time{}); err != nil {
		return err
	}
	c, err := r.find(id)
	if err != nil {
		return err
	}
	return c.attach(s, conn)
}

// readHello reads "<id> stdin|stdout|stderr\n" byte by byte, because what
// follows belongs to the container.
func readHello(r io.Reader) (id string, s stream, err error) {
	var line []byte
	for b := make([]byte, 1); len(line) < maxHello; line = append(line, b[0]) {
		if _, err := io.ReadFull(r, b); err != nil {
			return "", 0, fmt.Errorf("read the first line of a stream: %w", err)
		}
		if b[0] == '\n' {
			return parseHello(string(line))
		}
	}
	return "", 0, fmt.Errorf("first line of a stream: longer than %d bytes: %w", maxHello, errdefs.ErrInvalidArgument)
}

func parseHello(line string) (string, stream, error) {
	id, name, _ := strings.Cut(line, " ")
	for s := range streamCount {
		if name == s.String() && validID.MatchString(id) {
			return id, s, nil
		}
	}
	return "", 0, fmt.Errorf("first line of a stream: %q is not an id and stdin, stdout or stderr: %w", line, errdefs.ErrInvalidArgument)
}

// drain keeps a reader on a connection that carries output: Linux does not
// wake a writer on AF_VSOCK when the peer resets the connection while unread
// data is queued. The end of what the peer sends is not the end of its reading.
func drain(conn net.Conn) {
	if _, err := io.Copy(io.Discard, conn); err != nil && !errors.Is(err, net.ErrClosed) {
		_ = conn.Close() // wakes the writer
	}
}

// sendAll copies output until its end and tells the peer of it. When the peer
// is gone, the closed pipe tells the container.
func sendAll(conn net.Conn, pipe io.ReadCloser) error {
	_, err := io.Copy(conn, pipe)
	err = errors.Join(err, pipe.Close())
	if half, ok := conn.(interface{ CloseWrite() error }); ok {
		return errors.Join(err, half.CloseWrite())
	}
	return errors.Join(err, conn.Close())
}
