package kata

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// newScanner returns a scanner that only the test drives, on dir.
func newScanner(dir string) *scanner {
	return &scanner{
		cfg: Config{RunDirs: []string{dir}, Rescan: noRescan}, log: slog.New(slog.DiscardHandler),
		h: &recorder{events: make(chan string, 64)}, results: make(chan result),
		places: map[place]*entry{}, ids: map[string]*entry{}, owners: map[Identity]*entry{},
	}
}

// mute makes a shim that takes connections and never answers, until the test
// ends.
func mute(t *testing.T, dir, id string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Join(dir, id), 0o750); err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, id, monitor), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
}

func closed(c chan struct{}) bool {
	select {
	case <-c:
		return true
	default:
		return false
	}
}

// What waits for a look at all shims waits for one answer, or silence, of each:
// not until none of them is being asked again.
func TestRescanWaitsOnce(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	s := newScanner(dir)
	defer s.asks.Wait()
	defer cancel()
	mute(t, dir, "one")
	s.scan()
	s.start(ctx) // before the question, and counts for it
	mute(t, dir, "two")
	s.scan()
	done := make(chan struct{})
	s.wait(done)
	s.start(ctx)
	for range 2 {
		if s.release(); closed(done) {
			t.Fatal("did not wait for both")
		}
		s.settle(ctx, <-s.results)
		s.hurry() // as another caller does
		s.start(ctx)
	}
	if s.release(); !closed(done) || s.inFlight == 0 {
		t.Errorf("waits still, or for nothing: %d asked again", s.inFlight)
	}
}

// However many sockets there are, and however often they are replaced, a few are
// asked at a time, and each once.
func TestQuestionsBounded(t *testing.T) {
	dir := t.TempDir()
	ctx, cancel := context.WithCancel(t.Context())
	s := newScanner(dir)
	defer s.asks.Wait()
	defer cancel()
	mute(t, dir, "one")
	for range 3 {
		s.scan()
		s.start(ctx)
		if s.inFlight != 1 {
			t.Fatalf("%d questions to one shim", s.inFlight)
		}
		if err := os.Remove(filepath.Join(dir, "one", monitor)); err != nil {
			t.Fatal(err)
		}
		mute(t, dir, "one")
	}
	for i := range 2 * maxAsks {
		mute(t, dir, fmt.Sprintf("more%d", i))
	}
	s.scan()
	s.start(ctx)
	if s.inFlight != maxAsks || !s.next().After(time.Now()) {
		t.Errorf("%d questions at a time; next %s", s.inFlight, s.next())
	}
}

// A process of another user is no shim, wherever it listens.
func TestForeignShim(t *testing.T) {
	if os.Getuid() != 0 {
		t.Skip("needs root: listens as another user")
	}
	w := watch(t, noRescan)
	dir := filepath.Join(w.rust, "one")
	if err := os.MkdirAll(dir, 0o750); err != nil {
		t.Fatal(err)
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	early := filepath.Join(t.TempDir(), monitor) // nobody asks there before it listens
	if err := unix.Bind(fd, &unix.SockaddrUnix{Name: early}); err != nil {
		t.Fatal(err)
	}
	listening := make(chan error)
	go func() {
		runtime.LockOSThread() // the thread ends with the goroutine: it is another user's
		const nobody = 65534
		if _, _, errno := unix.RawSyscall(unix.SYS_SETRESUID, nobody, nobody, nobody); errno != 0 {
			listening <- errno
			return
		}
		listening <- unix.Listen(fd, 8)
	}()
	if err := errors.Join(<-listening, os.Rename(early, filepath.Join(dir, monitor))); err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), monitor)
	l, err := net.FileListener(f)
	if err := errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	srv := &http.Server{Handler: says("vsock://100:1024"), ReadHeaderTimeout: patience}
	go func() { _ = srv.Serve(l) }() // ends with Close
	defer srv.Close()
	w.rescan(t)
	w.none(t)
	if !strings.Contains(w.log.String(), "user 65534 listens") {
		t.Errorf("log: %s", w.log)
	}
}
