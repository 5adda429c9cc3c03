package kata

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// patience bounds what a test waits for.
const patience = 20 * time.Second

// shim is a shim's HTTP server on its socket. Like the Go shim's, its socket
// stays when it is killed; handler is GET /agent-url.
type shim struct {
	dir string
	l   *net.UnixListener
	srv *http.Server
}

// startShim makes the directory and socket of a sandbox.
func startShim(t *testing.T, runDir, id string, handler http.HandlerFunc) *shim {
	t.Helper()
	s := &shim{dir: filepath.Join(runDir, id)}
	if err := os.MkdirAll(s.dir, 0o750); err != nil {
		t.Fatal(err)
	}
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(s.dir, monitor), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	l.SetUnlinkOnClose(false)
	mux := http.NewServeMux()
	mux.HandleFunc("GET /agent-url", handler)
	s.l, s.srv = l, &http.Server{Handler: mux, ReadHeaderTimeout: patience}
	go func() { _ = s.srv.Serve(l) }() // ends with kill
	t.Cleanup(s.kill)
	return s
}

// kill ends the shim and leaves its directory.
func (s *shim) kill() { _ = s.srv.Close() }

// stop ends the shim as it does itself when its sandbox is over.
func (s *shim) stop(t *testing.T) {
	t.Helper()
	s.kill()
	if err := os.RemoveAll(s.dir); err != nil {
		t.Fatal(err)
	}
}

func says(url string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { fmt.Fprint(w, url) }
}

// recorder is a handler that tells of its calls.
type recorder struct {
	events chan string
	refuse atomic.Int32 // how many calls of Added fail
}

func (r *recorder) Added(s Sandbox) error {
	if r.refuse.Add(-1) >= 0 {
		return errors.New("not now")
	}
	r.events <- fmt.Sprintf("+%s %s", s.ID, s.Identity)
	return nil
}

func (r *recorder) Removed(id string) { r.events <- "-" + id }

// expect waits for events in any order.
func (r *recorder) expect(t *testing.T, want ...string) {
	t.Helper()
	left := map[string]bool{}
	for _, w := range want {
		left[w] = true
	}
	deadline := time.After(patience)
	for len(left) > 0 {
		select {
		case e := <-r.events:
			if !left[e] {
				t.Fatalf("event %q, waiting for %q", e, want)
			}
			delete(left, e)
		case <-deadline:
			t.Fatalf("there was no event of %v", left)
		}
	}
}

// none says that nothing happened.
func (r *recorder) none(t *testing.T) {
	t.Helper()
	select {
	case e := <-r.events:
		t.Errorf("event %q", e)
	default:
	}
}

// syncBuffer is a log.
type syncBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer // protected by mu
}

func (b *syncBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *syncBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// world is a Watcher on empty run directories.
type world struct {
	*Watcher
	*recorder
	rust, goDir string
	log         *syncBuffer
}

// noRescan is a Rescan that no test waits for: what is seen was notified.
const noRescan = time.Hour

func watch(t *testing.T, rescan time.Duration) *world {
	t.Helper()
	dir := t.TempDir()
	w := &world{
		recorder: &recorder{events: make(chan string, 64)}, log: new(syncBuffer),
		rust: filepath.Join(dir, "kata"), goDir: filepath.Join(dir, "vc", "sbs"),
	}
	w.Watcher = NewWatcher(Config{RunDirs: []string{w.rust, w.goDir}, Rescan: rescan, Log: slog.New(slog.NewTextHandler(w.log, nil))})
	t.Cleanup(runWatcher(t, w.Watcher, w.recorder))
	return w
}

// runWatcher runs w until the result is called.
func runWatcher(t *testing.T, w *Watcher, h Handler) (stop func()) {
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		w.Run(ctx, h)
	}()
	return func() {
		cancel()
		<-done
	}
}

func (w *world) rescan(t *testing.T) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	if err := w.Rescan(ctx); err != nil {
		t.Fatal(err)
	}
}

// Sandboxes of both runtimes come and go; the run directories are made only
// then, and made again.
func TestWatch(t *testing.T) {
	w := watch(t, noRescan)
	w.rescan(t) // there is nothing, not even the directories
	one := startShim(t, w.rust, "one", says("vsock://100:1024"))
	w.expect(t, "+one cid 100")
	two := startShim(t, w.goDir, "two", says("vsock://200:1024"))
	w.expect(t, "+two cid 200")
	path := filepath.Join(w.rust, "three", "root", "kata.hvsock")
	startShim(t, w.rust, "three", says("hvsock://"+path+":1024"))
	w.expect(t, "+three hybrid socket "+path)
	one.stop(t)
	w.expect(t, "-one")
	two.stop(t)
	w.expect(t, "-two")
	if err := os.RemoveAll(filepath.Dir(w.goDir)); err != nil {
		t.Fatal(err)
	}
	startShim(t, w.goDir, "four", says("vsock://200:1024"))
	w.expect(t, "+four cid 200")
	w.none(t)
}

// Sandboxes that are there before the Watcher are found, and stay when it ends.
func TestWatchStart(t *testing.T) {
	w := watch(t, noRescan)
	startShim(t, w.rust, "one", says("vsock://100:1024"))
	w.expect(t, "+one cid 100")
	again := NewWatcher(w.cfg)
	r := &recorder{events: make(chan string, 8)}
	stop := runWatcher(t, again, r)
	r.expect(t, "+one cid 100")
	stop()
	r.none(t)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := again.Rescan(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("rescan of one that ended: %v", err)
	}
}

// Without inotify, sandboxes are seen all the same.
func TestUnwatched(t *testing.T) {
	w := &world{recorder: &recorder{events: make(chan string, 64)}, log: new(syncBuffer), rust: filepath.Join(t.TempDir(), "kata")}
	w.Watcher = NewWatcher(Config{RunDirs: []string{w.rust}, Rescan: noRescan, Log: slog.New(slog.NewTextHandler(w.log, nil))})
	w.notify = func() (*notifier, error) { return nil, unix.EMFILE }
	t.Cleanup(runWatcher(t, w.Watcher, w.recorder))
	one := startShim(t, w.rust, "one", says("vsock://100:1024"))
	w.expect(t, "+one cid 100")
	one.stop(t)
	w.expect(t, "-one")
	if n := strings.Count(w.log.String(), "max_user_instances"); n != 1 {
		t.Errorf("said %d times:\n%s", n, w.log)
	}
}

// A shim that is killed leaves directory and socket.
func TestShimKilled(t *testing.T) {
	w := watch(t, 50*time.Millisecond)
	one := startShim(t, w.rust, "one", says("vsock://100:1024"))
	w.expect(t, "+one cid 100")
	w.rescan(t)
	w.none(t)
	one.kill()
	w.expect(t, "-one")
}

// A shim whose agent is not started yet is asked again: nothing (runtime-rs,
// handlers.rs), a port alone (runtime-rs, agent/src/kata/mod.rs), an error (Go,
// shim_management.go), a handler that panics (Go: no sandbox yet).
func TestShimStarting(t *testing.T) {
	w := watch(t, noRescan)
	var calls atomic.Int32
	startShim(t, w.rust, "one", func(rw http.ResponseWriter, _ *http.Request) {
		switch calls.Add(1) {
		case 1:
		case 2:
			fmt.Fprint(rw, ":1024")
		case 3:
			http.Error(rw, "Invalid socket type", http.StatusInternalServerError)
		case 4:
			panic(http.ErrAbortHandler)
		default:
			fmt.Fprint(rw, "vsock://100:1024")
		}
	})
	w.expect(t, "+one cid 100")
	if strings.Contains(w.log.String(), "not served") {
		t.Errorf("log: %s", w.log)
	}
}

// A handler that fails is asked again.
func TestAddedFails(t *testing.T) {
	w := watch(t, noRescan)
	w.refuse.Store(3)
	startShim(t, w.rust, "one", says("vsock://100:1024"))
	w.expect(t, "+one cid 100")
	if n := strings.Count(w.log.String(), "not now"); n != 1 {
		t.Errorf("said %d times:\n%s", n, w.log)
	}
}

// Whatever lies in a run directory, the sandboxes beside it are found, and
// nothing else is.
func TestHostileDirectory(t *testing.T) {
	w := watch(t, 100*time.Millisecond)
	for id, h := range map[string]http.HandlerFunc{
		"endless": func(rw http.ResponseWriter, r *http.Request) {
			for r.Context().Err() == nil {
				if _, err := rw.Write(make([]byte, 1<<16)); err != nil {
					return
				}
			}
		},
		"silent":  func(_ http.ResponseWriter, r *http.Request) { <-r.Context().Done() },
		"headers": func(rw http.ResponseWriter, _ *http.Request) { rw.Header().Set("X", strings.Repeat("x", 1<<20)) },
		"redirect": func(rw http.ResponseWriter, r *http.Request) {
			http.Redirect(rw, r, "http://127.0.0.1/agent-url", http.StatusFound)
		},
		"gzip": func(rw http.ResponseWriter, _ *http.Request) {
			rw.Header().Set("Content-Encoding", "gzip")
			fmt.Fprint(rw, "vsock://101:1024")
		},
		"host":      says("vsock://2:1024"),
		"any":       says("vsock://-1:1024"),
		"elsewhere": says("hvsock:///etc/passwd:1024"),
		"remote":    says("remote:///run/peerpod/agent:1024"),
		".hidden":   says("vsock://102:1024"),
		"a b":       says("vsock://103:1024"),
	} {
		startShim(t, w.rust, id, h)
	}
	file, fifo, link := filepath.Join(w.rust, "file"), filepath.Join(w.rust, "fifo", monitor), filepath.Join(w.rust, "link", monitor)
	for _, dir := range []string{"empty", "fifo", "link", "deaf"} {
		if err := os.Mkdir(filepath.Join(w.rust, dir), 0o750); err != nil {
			t.Fatal(err)
		}
	}
	outside := startShim(t, filepath.Join(filepath.Dir(w.rust), "outside"), "real", says("vsock://104:1024"))
	deaf := filepath.Join(w.rust, "deaf", monitor)
	l, err := net.Listen("unix", deaf)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	err = errors.Join(
		os.WriteFile(file, nil, 0o600), unix.Mkfifo(fifo, 0o600),
		os.Symlink(filepath.Join(outside.dir, monitor), link), os.Symlink(outside.dir, filepath.Join(w.rust, "linked")),
	)
	if err != nil {
		t.Fatal(err)
	}
	startShim(t, w.rust, "good", says("vsock://100:1024"))
	// "gzip" says what it is in plain bytes, which is what is read.
	w.expect(t, "+good cid 100", "+gzip cid 101")
	w.rescan(t)
	w.none(t)
	for _, want := range []string{"host", "any", "elsewhere", "remote"} {
		if !strings.Contains(w.log.String(), "sandbox="+want) {
			t.Errorf("nothing is said of %s:\n%s", want, w.log)
		}
	}
}

// A sandbox that ends and begins again under the same id, faster than it is
// looked at, is removed and added.
func TestIDAgain(t *testing.T) {
	w := watch(t, noRescan)
	for i := range 20 {
		s := startShim(t, w.rust, "one", says(fmt.Sprintf("vsock://%d:1024", 100+i)))
		w.expect(t, fmt.Sprintf("+one cid %d", 100+i))
		s.stop(t)
		s = startShim(t, w.rust, "one", says(fmt.Sprintf("vsock://%d:1024", 200+i)))
		w.expect(t, "-one", fmt.Sprintf("+one cid %d", 200+i))
		s.stop(t)
		w.expect(t, "-one")
	}
}

// An identity is one sandbox's: another gets it when the first one's shim is
// dead, whether that was noticed or not.
func TestIdentityTaken(t *testing.T) {
	w := watch(t, noRescan)
	first := startShim(t, w.rust, "first", says("vsock://100:1024"))
	w.expect(t, "+first cid 100")
	startShim(t, w.rust, "second", says("vsock://100:1024"))
	startShim(t, w.goDir, "first", says("vsock://300:1024")) // the id
	w.rescan(t)
	w.none(t)
	if n := strings.Count(w.log.String(), "cid 100 belongs to sandbox first"); n != 1 {
		t.Errorf("said %d times:\n%s", n, w.log)
	}
	first.kill()
	w.rescan(t) // asks the others again
	w.expect(t, "-first", "+second cid 100", "+first cid 300")
}

// Many sandboxes at once, while others go.
func TestManySandboxes(t *testing.T) {
	w := watch(t, noRescan)
	const n = 200
	var shims []*shim
	var added, removed []string
	for i := range n {
		id := fmt.Sprintf("s%d", i)
		shims = append(shims, startShim(t, w.rust, id, says(fmt.Sprintf("vsock://%d:1024", 1000+i))))
		added = append(added, fmt.Sprintf("+%s cid %d", id, 1000+i))
		removed = append(removed, "-"+id)
	}
	w.expect(t, added...)
	for _, s := range shims {
		s.stop(t)
	}
	w.expect(t, removed...)
}

// A run directory may lead through a link and be moved away.
func TestRunDirMoved(t *testing.T) {
	w := watch(t, noRescan)
	one := startShim(t, w.rust, "one", says("vsock://100:1024"))
	w.expect(t, "+one cid 100")
	if err := os.Rename(w.rust, w.rust+".old"); err != nil {
		t.Fatal(err)
	}
	w.expect(t, "-one")
	if err := os.Symlink(w.rust+".old", w.rust); err != nil {
		t.Fatal(err)
	}
	w.expect(t, "+one cid 100")
	one.kill()
}
