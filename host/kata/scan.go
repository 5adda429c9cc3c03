package kata

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// state of an entry, and what leads on:
//
//	waiting  due and a socket is there     -> asking
//	asking   answer that the handler takes -> known
//	asking   none, or a refused one        -> waiting, for longer
//	known    due                           -> probing
//	probing  somebody listens              -> known
//	probing  nobody listens                -> waiting; removed
//	any      another socket, or none       -> waiting; removed if it was known
//	any      no directory                  -> forgotten; removed if it was known
type state int

const (
	waiting state = iota
	asking
	known
	probing
)

// place is a sandbox's directory.
type place struct{ dir, id string }

func (p place) path() string   { return filepath.Join(p.dir, p.id) }
func (p place) socket() string { return filepath.Join(p.dir, p.id, monitor) }

// entry is a directory that is or may become a sandbox's.
type entry struct {
	place
	state    state
	stamp    stamp // of the socket; zero when there is none
	busy     bool  // a question is under way, perhaps about a socket of before
	due      time.Time
	pause    time.Duration // before the next question
	identity Identity      // known and probing
	refusal  string        // what was said last about it in the log
}

// result of asking or probing.
type result struct {
	e     *entry
	stamp stamp // of the socket that was asked
	gone  bool  // of a probe
	url   string
	err   error
}

// waiter is a caller of Rescan.
type waiter struct {
	done chan struct{}
	left map[*entry]bool // shims that have not answered since
}

// scanner is a Watcher at work. It belongs to one goroutine, except asks.
type scanner struct {
	cfg      Config
	log      *slog.Logger
	h        Handler
	notifier *notifier       // nil where there is none
	hints    <-chan struct{} // of notifier
	results  chan result
	asks     sync.WaitGroup // goroutines that ask

	places   map[place]*entry
	ids      map[string]*entry   // known ones
	owners   map[Identity]*entry // known ones
	inFlight int                 // questions
	scanAt   time.Time
	waiting  []waiter
	full     bool // said that there are too many
	blind    bool // said that directories cannot be watched
}

// run scans, asks and tells until ctx ends.
func (s *scanner) run(ctx context.Context, requests <-chan chan struct{}) {
	timer := time.NewTimer(0)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-s.hints:
			if soon := time.Now().Add(settle); soon.Before(s.scanAt) {
				s.scanAt = soon
			}
		case done := <-requests:
			s.hurry()
			s.scan()
			s.wait(done)
		case r := <-s.results:
			s.settle(ctx, r)
		case <-timer.C:
			if !time.Now().Before(s.scanAt) {
				s.scan()
			}
		}
		s.start(ctx)
		s.release()
		timer.Reset(time.Until(s.next()))
	}
}

// scan looks at all directories. Watches are set before directories are read,
// so that no change falls between.
func (s *scanner) scan() {
	s.scanAt = time.Now().Add(s.cfg.Rescan)
	s.watch()
	for _, dir := range s.cfg.RunDirs {
		s.list(dir)
	}
	s.watch()
	for _, e := range s.places {
		s.look(e)
	}
}

// watch watches the run directories, or what they will appear in, and for the
// sockets in them. What else a VMM makes in its directory costs no look.
func (s *scanner) watch() {
	if s.notifier == nil {
		return
	}
	want := map[string]map[string]bool{}
	add := func(dir, name string) {
		names, ok := want[dir]
		switch {
		case name == "":
			want[dir] = nil
		case !ok:
			want[dir] = map[string]bool{name: true}
		case names != nil:
			names[name] = true
		}
	}
	for _, path := range s.cfg.RunDirs {
		add(nearest(path))
	}
	for p := range s.places {
		add(p.path(), monitor)
	}
	if err := s.notifier.set(want); err != nil {
		s.unwatched(err)
	}
}

// unwatched makes up for directories that cannot be watched, and says so once.
func (s *scanner) unwatched(err error) {
	s.cfg.Rescan = min(s.cfg.Rescan, blindRescan)
	if !s.blind {
		s.log.Warn("sandboxes are seen late: raise fs.inotify.max_user_instances and max_user_watches", "delay", s.cfg.Rescan, "error", err)
	}
	s.blind = true
}

// list adds the new directories in dir.
func (s *scanner) list(dir string) {
	f, err := os.OpenFile(dir, os.O_RDONLY|unix.O_DIRECTORY, 0)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			s.log.Warn("a run directory cannot be read", "error", err)
		}
		return
	}
	defer f.Close()
	names, err := f.ReadDir(maxNames)
	if err != nil && !errors.Is(err, io.EOF) {
		s.log.Warn("a run directory cannot be read", "error", err)
	}
	for _, d := range names {
		p := place{dir, d.Name()}
		if !d.IsDir() || !ValidID(p.id) || s.places[p] != nil {
			continue
		}
		if len(s.places) >= maxSandboxes {
			if !s.full {
				s.log.Warn("there are too many sandboxes; further ones are not looked at", "limit", maxSandboxes)
			}
			s.full = true
			return
		}
		s.places[p] = &entry{place: p, pause: firstTry}
	}
	s.full = false
}

// look compares an entry with what is on the file system.
func (s *scanner) look(e *entry) {
	now, ok := stampOf(unix.AT_FDCWD, e.socket(), unix.S_IFSOCK)
	if now != e.stamp {
		s.lose(e, "its shim's socket is gone or another")
		e.stamp, e.due, e.pause = now, time.Now(), firstTry
	}
	if ok {
		return
	}
	if _, err := os.Lstat(e.path()); errors.Is(err, fs.ErrNotExist) {
		delete(s.places, e.place)
	}
}

// lose takes back that an entry is a known sandbox.
func (s *scanner) lose(e *entry, why string) {
	if e.identity != (Identity{}) {
		delete(s.ids, e.id)
		delete(s.owners, e.identity)
		e.identity = Identity{}
		s.log.Info("sandbox gone", "sandbox", e.id, "reason", why)
		s.h.Removed(e.id)
	}
	e.state, e.refusal = waiting, ""
}

// hurry makes every shim that has not answered due.
func (s *scanner) hurry() {
	for _, e := range s.places {
		if e.state == waiting {
			e.due, e.pause = time.Now(), firstTry
		}
	}
}

// wait notes a caller of Rescan. Shims that do not answer keep a caller waiting
// as long as one question takes, however often they are asked again.
func (s *scanner) wait(done chan struct{}) {
	w := waiter{done: done, left: map[*entry]bool{}}
	for _, e := range s.places {
		if (e.state == waiting || e.state == asking) && e.stamp != (stamp{}) {
			w.left[e] = true
		}
	}
	s.waiting = append(s.waiting, w)
}

// start asks and probes what is due, maxAsks at a time.
func (s *scanner) start(ctx context.Context) {
	for _, e := range s.places {
		if s.inFlight >= maxAsks {
			return
		}
		if s.ready(e) && !time.Now().Before(e.due) {
			s.question(ctx, e)
		}
	}
}

func (s *scanner) question(ctx context.Context, e *entry) {
	r, socket, probe := result{e: e, stamp: e.stamp}, e.socket(), e.state == known
	e.state, e.busy = asking, true
	if probe {
		e.state = probing
	}
	s.inFlight++
	s.asks.Go(func() {
		if probe {
			r.gone = gone(ctx, socket)
		} else {
			r.url, r.err = ask(ctx, socket)
		}
		select {
		case s.results <- r:
		case <-ctx.Done():
		}
	})
}

// ready says whether an entry can be asked when it is due. There is one question
// at a time for each: whoever replaces a socket over and over takes no more.
func (s *scanner) ready(e *entry) bool {
	return (e.state == waiting || e.state == known) && e.stamp != (stamp{}) && !e.busy
}

// settle takes the result of a question. One about a socket that another has
// replaced meanwhile counts for nothing.
func (s *scanner) settle(ctx context.Context, r result) {
	e := r.e
	s.inFlight--
	e.busy = false
	for _, w := range s.waiting {
		delete(w.left, e)
	}
	s.look(e)
	if s.places[e.place] != e || e.stamp != r.stamp || e.state != asking && e.state != probing {
		return
	}
	if e.state == probing {
		e.state, e.due = known, time.Now().Add(s.cfg.Rescan)
		if r.gone {
			s.lose(e, "nobody listens on its shim's socket")
			s.later(e)
		}
		return
	}
	err := r.err
	if err == nil {
		err = s.accept(ctx, e, r.url)
	}
	if err != nil {
		e.state = waiting
		s.later(e)
		s.refuse(e, err)
	}
}

// later puts the next question off.
func (s *scanner) later(e *entry) {
	e.due = time.Now().Add(e.pause)
	e.pause = min(2*e.pause, s.cfg.Rescan)
}

// refuse says once why a directory is no sandbox that can be served. A shim
// that is starting is no news.
func (s *scanner) refuse(e *entry, err error) {
	if errdefs.IsUnavailable(err) || err.Error() == e.refusal {
		return
	}
	e.refusal = err.Error()
	s.log.Warn("sandbox not served", "sandbox", e.id, "directory", e.path(), "error", err)
}

// accept makes a sandbox known. Who has its id or identity already keeps it
// while its shim lives.
func (s *scanner) accept(ctx context.Context, e *entry, url string) error {
	identity, err := ParseURL(e.id, url)
	if err != nil {
		return err
	}
	for _, other := range []*entry{s.ids[e.id], s.owners[identity]} {
		if other == nil || other.identity == (Identity{}) {
			continue
		}
		if s.look(other); other.identity != (Identity{}) && gone(ctx, other.socket()) {
			s.lose(other, "another has its identity, and nobody listens on its shim's socket")
		}
		if other.identity != (Identity{}) {
			return fmt.Errorf("%s belongs to sandbox %s in %s: %w", identity, other.id, other.dir, errdefs.ErrAlreadyExists)
		}
	}
	if err := s.h.Added(Sandbox{ID: e.id, Identity: identity}); err != nil {
		return err
	}
	e.state, e.identity, e.refusal = known, identity, ""
	e.due, e.pause = time.Now().Add(s.cfg.Rescan), firstTry
	s.ids[e.id], s.owners[identity] = e, e
	return nil
}

// release answers callers of Rescan for whom all shims have answered, or are
// gone.
func (s *scanner) release() {
	s.waiting = slices.DeleteFunc(s.waiting, func(w waiter) bool {
		maps.DeleteFunc(w.left, func(e *entry, _ bool) bool { return s.places[e.place] != e || e.stamp == (stamp{}) })
		if len(w.left) == 0 {
			close(w.done)
		}
		return len(w.left) == 0
	})
}

// next is when there is something to do.
func (s *scanner) next() time.Time {
	at := s.scanAt
	if s.inFlight >= maxAsks {
		return at // or an answer comes
	}
	for _, e := range s.places {
		if s.ready(e) && e.due.Before(at) {
			at = e.due
		}
	}
	return at
}
