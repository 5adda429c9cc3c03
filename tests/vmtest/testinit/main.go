// Command testinit is the init of guests in which the vsock device and the
// packages around it are tried. It serves one command for each connection to its
// port: the first line names it, the stream is its input and output.
package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/tatami-containers/tatami/protocols/vsock"
	"golang.org/x/sys/unix"
)

// port is where the commands come in; the tests know it, too.
const port = 3000

func main() {
	fmt.Fprintln(os.Stderr, "testinit:", run())
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		fmt.Fprintln(os.Stderr, "testinit: power off:", err)
	}
}

// run returns only with an error.
func run() error {
	for _, m := range [][2]string{{"proc", "/proc"}, {"sysfs", "/sys"}, {"devtmpfs", "/dev"}, {"tmpfs", "/tmp"}} {
		// Some kernels mount devtmpfs by themselves.
		if err := unix.Mount(m[0], m[1], m[0], 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	if err := loadModules("/lib/modules/tatami.order"); err != nil {
		return err
	}
	l, err := vsock.Listen("vsock:" + strconv.Itoa(port))
	if err != nil {
		return err
	}
	fmt.Println("testinit: ready")
	for {
		c, err := l.Accept()
		if err != nil {
			return err
		}
		go serve(c)
	}
}

func loadModules(order string) error {
	b, err := os.ReadFile(order)
	if err != nil {
		return err
	}
	for _, name := range strings.Fields(string(b)) {
		f, err := os.Open(filepath.Join(filepath.Dir(order), name))
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("load %s: %w", name, err)
		}
	}
	return nil
}

// stream is a connection whose first line was read.
type stream struct {
	net.Conn
	r *bufio.Reader
}

func (s *stream) Read(p []byte) (int, error) { return s.r.Read(p) }

func (s *stream) closeWrite() error {
	return s.Conn.(interface{ CloseWrite() error }).CloseWrite()
}

func serve(c net.Conn) {
	defer c.Close()
	s := &stream{c, bufio.NewReaderSize(c, 256<<10)}
	line, err := s.r.ReadString('\n')
	if err != nil {
		return
	}
	verb, arg, _ := strings.Cut(strings.TrimSpace(line), " ")
	if err := command(s, verb, arg); err != nil {
		_, _ = fmt.Fprintf(s, "%s: %v\n", verb, err) // the peer may be gone
	}
}

func command(s *stream, verb, arg string) error {
	switch verb {
	case "echo":
		_, err := io.Copy(s, s)
		return errors.Join(err, s.closeWrite())
	case "sink":
		return sink(s, arg)
	case "source":
		return source(s, arg)
	case "dial":
		return dial(s, arg)
	case "loopback":
		return loopback(s)
	case "sh":
		cmd := exec.Command("/bin/sh", "-c", arg) //nolint:noctx // ends with the machine
		cmd.Stdout, cmd.Stderr = s, s
		return cmd.Run()
	case "poweroff":
		return unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
	case "reboot":
		return unix.Reboot(unix.LINUX_REBOOT_CMD_RESTART)
	}
	return errors.New("unknown command")
}

// sink counts what comes, until the end or until that many bytes.
func sink(s *stream, count string) error {
	var r io.Reader = s
	if n, err := strconv.ParseInt(count, 10, 64); err == nil {
		r = io.LimitReader(s, n)
	}
	n, err := io.Copy(io.Discard, r)
	_, _ = fmt.Fprintln(s, n) // what is missing is seen by the peer
	return err
}

// source writes that many bytes. The reader beside it notices a reset: Linux does
// not wake a writer for one.
func source(s *stream, count string) error {
	left, err := strconv.ParseInt(count, 10, 64)
	if err != nil {
		return err
	}
	go func() {
		_, _ = io.Copy(io.Discard, s)
		_ = s.SetWriteDeadline(time.Unix(1, 0))
	}()
	buf := make([]byte, 256<<10)
	for left > 0 {
		n, err := s.Conn.Write(buf[:min(left, int64(len(buf)))])
		if err != nil {
			return err
		}
		left -= int64(n)
	}
	return s.closeWrite()
}

// dial connects to the node and joins the two streams.
func dial(s *stream, port string) error {
	c, err := vsock.Dial(context.Background(), fmt.Sprintf("vsock:%d:%s", vsock.HostCID, port))
	if err != nil {
		return err
	}
	defer c.Close()
	up := make(chan error, 1)
	go func() {
		_, err := io.Copy(c, s)
		up <- errors.Join(err, c.(interface{ CloseWrite() error }).CloseWrite())
	}()
	_, err = io.Copy(s, c)
	return errors.Join(err, s.closeWrite(), <-up)
}

// loopback tries AF_VSOCK inside the guest: listen, dial, the peer's CID.
func loopback(s *stream) error {
	l, err := vsock.Listen("vsock:3001")
	if err != nil {
		return err
	}
	defer l.Close()
	go func() {
		c, err := l.Accept()
		if err != nil {
			return
		}
		defer c.Close()
		cid, ok := vsock.PeerCID(c)
		b, _ := io.ReadAll(c) // the answer shows what is missing
		_, _ = fmt.Fprintf(c, "%s from %d %v", b, cid, ok)
	}()
	c, err := vsock.Dial(context.Background(), fmt.Sprintf("vsock:%d:3001", vsock.LocalCID))
	if err != nil {
		return err
	}
	defer c.Close()
	if _, err := io.WriteString(c, "hello"); err != nil {
		return err
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		return err
	}
	_, err = io.Copy(s, c)
	return err
}
