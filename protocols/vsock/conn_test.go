package vsock

import (
	"context"
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
)

// echo accepts connections and sends back what comes until the peer ends.
func echo(t *testing.T, l net.Listener) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = io.Copy(c, c) // the client sees what is missing
			_ = c.Close()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close() // tests close it themselves, too
		<-done
	})
}

func roundTrip(t *testing.T, c net.Conn) {
	t.Helper()
	defer c.Close()
	if _, err := io.WriteString(c, "hello"); err != nil {
		t.Fatal(err)
	}
	if err := c.(interface{ CloseWrite() error }).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	b, err := io.ReadAll(c)
	if err != nil || string(b) != "hello" {
		t.Fatalf("got %q, %v", b, err)
	}
}

// vmm plays the VMM's side of the hybrid protocol: port 7 echoes, others are
// refused, 13 never answers.
func vmm(t *testing.T, path string) {
	t.Helper()
	l, err := Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			port, err := ReadConnect(c)
			if err == nil && port == 7 {
				err = WriteOK(c, 1<<30)
			}
			if err == nil && (port == 7 || port == 13) {
				_, _ = io.Copy(c, c) // the client sees what is missing
			}
			_ = c.Close()
		}
	}()
	t.Cleanup(func() {
		_ = l.Close()
		<-done
	})
}

func TestUnix(t *testing.T) {
	addr := "unix:" + filepath.Join(t.TempDir(), "s")
	l, err := Listen(addr)
	if err != nil {
		t.Fatal(err)
	}
	echo(t, l)
	c, err := Dial(t.Context(), addr)
	if err != nil {
		t.Fatal(err)
	}
	if cid, ok := PeerCID(c); ok {
		t.Errorf("a unix socket has peer CID %d", cid)
	}
	roundTrip(t, c)
}

func TestHybridDial(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vm.sock")
	vmm(t, path)
	c, err := Dial(t.Context(), "hybrid:"+path+":7")
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, c)
	if _, err := Dial(t.Context(), "hybrid:"+path+":8"); !errdefs.IsUnavailable(err) {
		t.Errorf("refused port: %v", err)
	}
}

func TestHybridListen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vm.sock")
	l, err := Listen("hybrid:" + path + ":2110")
	if err != nil {
		t.Fatal(err)
	}
	echo(t, l)
	c, err := Dial(t.Context(), "unix:"+path+"_2110")
	if err != nil {
		t.Fatal(err)
	}
	roundTrip(t, c)
}

func TestDialContext(t *testing.T) {
	path := filepath.Join(t.TempDir(), "vm.sock")
	vmm(t, path)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if _, err := Dial(ctx, "hybrid:"+path+":13"); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("silent VMM: %v", err)
	}
}

func TestDialErrors(t *testing.T) {
	none := filepath.Join(t.TempDir(), "none")
	for _, addr := range []string{"unix:" + none, "hybrid:" + none + ":1"} {
		if _, err := Dial(t.Context(), addr); !errdefs.IsUnavailable(err) {
			t.Errorf("%s: %v, want ErrUnavailable", addr, err)
		}
	}
	for _, addr := range []string{"vsock:2100", "nonsense"} {
		if _, err := Dial(t.Context(), addr); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v, want ErrInvalidArgument", addr, err)
		}
	}
}

func TestListenReplacesStaleSocket(t *testing.T) {
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l2, err := Listen("unix:" + path)
	if err != nil {
		t.Fatal(err)
	}
	echo(t, l2)
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("socket's mode: %v, %v", st, err)
	}
	if _, err := Listen("unix:" + path); !errdefs.IsAlreadyExists(err) {
		t.Errorf("served socket: %v, want ErrAlreadyExists", err)
	}
	c, err := Dial(t.Context(), "unix:"+path)
	if err != nil {
		t.Fatalf("the first listener was lost: %v", err)
	}
	roundTrip(t, c)
}

func TestListenKeepsOtherFiles(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	if err := os.WriteFile(path, []byte("precious"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen("unix:" + path); !errdefs.IsAlreadyExists(err) {
		t.Errorf("regular file: %v, want ErrAlreadyExists", err)
	}
	if b, err := os.ReadFile(path); err != nil || string(b) != "precious" {
		t.Errorf("file is %q, %v", b, err)
	}
}
