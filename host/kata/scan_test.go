package kata

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"
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
