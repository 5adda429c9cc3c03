package thread

import (
	"errors"
	"io"
	"os"
	"runtime"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestIsolatedSeesNoDescriptors(t *testing.T) {
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = r.Close() }()
	theirs := int(w.Fd())
	boom := errors.New("boom")
	err = Isolated(func() error {
		if _, err := unix.Write(theirs, []byte("x")); err != unix.EBADF {
			t.Errorf("write to a descriptor of the process: %v", err)
		}
		if _, err := unix.Open(os.DevNull, unix.O_RDONLY, 0); err != nil { // left open
			t.Error(err)
		}
		return boom
	})
	if !errors.Is(err, boom) {
		t.Errorf("got %v", err)
	}
	// Nothing else keeps the pipe's end open.
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Read(make([]byte, 1)); !errors.Is(err, io.EOF) {
		t.Errorf("read: %v", err)
	}
}

// The scheduler may poll and set timers on isolated threads.
func TestIsolatedUnderLoad(t *testing.T) {
	before := countFiles(t)
	stop := make(chan struct{})
	var noise, work sync.WaitGroup
	for range 4 {
		noise.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(time.Microsecond):
					runtime.GC()
				}
			}
		})
	}
	for range 8 {
		work.Go(func() {
			for range 100 {
				err := Isolated(func() error {
					<-time.After(10 * time.Microsecond)
					runtime.Gosched()
					return unix.Access("/", 0)
				})
				if err != nil {
					t.Error(err)
				}
			}
		})
	}
	work.Wait()
	close(stop)
	noise.Wait()
	if after := countFiles(t); after > before+2 { // the poller's own
		t.Errorf("%d descriptors, %d before", after, before)
	}
}

func countFiles(t *testing.T) int {
	t.Helper()
	files, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(files)
}

func TestHold(t *testing.T) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	if err := Hold(fds[1]); err != nil {
		t.Fatal(err)
	}
	// It is gone from here and still open there.
	if err := unix.Close(fds[1]); err != unix.EBADF {
		t.Errorf("close of a descriptor that was moved: %v", err)
	}
	if _, err := unix.Write(fds[0], []byte{}); err != nil {
		t.Errorf("write to the holder: %v", err)
	}
	if err := unix.Shutdown(fds[0], unix.SHUT_RDWR); err != nil {
		t.Error(err)
	}
	if err := unix.Close(fds[0]); err != nil {
		t.Error(err)
	}
}
