package session

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/containerd/errdefs"
)

// A session that is left to a later supervisor goes on there: same identity,
// still mounted, and its next worker knows that it is not the first.
func TestResume(t *testing.T) {
	for _, mode := range []Mode{Direct, Journal} {
		t.Run(string(mode), func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "session.json")
			cleanup := func(context.Context) error { t.Error("cleaned up"); return nil }
			s, dir, stop, result := run(t, mode, "living", SuperviseConfig{Keep: file, Cleanup: cleanup})
			await(t, dir, 1)
			fuse, err := s.Descriptor()
			if err != nil {
				t.Fatal(err)
			}
			stop()
			if err := <-result; err != nil {
				t.Fatal(err)
			}
			if !mounted(t, s.Dir()) {
				t.Fatal("session is not mounted any more")
			}
			next, err := Resume(file, fuse, nil)
			if err != nil {
				t.Fatal(err)
			}
			if next.id != s.id || next.Mode() != mode || next.Dir() != s.Dir() {
				t.Errorf("resumed %s %s %s, left %s %s %s", next.id, next.Mode(), next.Dir(), s.id, mode, s.Dir())
			}
			superviseAgain(t, next, dir)
			if mounted(t, s.Dir()) {
				t.Error("session is still mounted after its last supervisor")
			}
		})
	}
}

// superviseAgain runs a second worker of the session in dir and ends it.
func superviseAgain(t *testing.T, s *Session, dir string) {
	t.Helper()
	extra, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer extra.Close()
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() {
		done <- Supervise(ctx, SuperviseConfig{
			Session: s, Command: []string{"/proc/self/exe"}, ExtraFiles: []*os.File{extra},
			Env: append(os.Environ(), roleEnv+"=living", "TATAMI_TEST_DIR="+dir),
		})
	}()
	await(t, dir, 2)
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// What a journal has not seen answered reaches the next supervisor's worker.
func TestJournalIsKept(t *testing.T) {
	s := open(t, Journal)
	first, err := newJournal(s)
	if err != nil {
		t.Fatal(err)
	}
	requests := [][]byte{message(15, 7, 0), message(15, 9, 0), message(opInterrupt, 0, 7)}
	for _, msg := range requests {
		first.forward(msg)
	}
	s.pending = first.unanswered()
	if err := first.close(); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "session.json")
	if err := s.keep(file); err != nil {
		t.Fatal(err)
	}
	k, err := readKept(file)
	if err != nil {
		t.Fatal(err)
	}
	second, err := newJournal(s)
	if err != nil {
		t.Fatal(err)
	}
	if err := second.recall(k.Pending); err != nil {
		t.Fatal(err)
	}
	left := second.inOrder()
	if len(left) != 2 || string(left[0].msg) != string(requests[0]) || string(left[1].msg) != string(requests[1]) || left[0].interrupt == nil || left[1].interrupt != nil {
		t.Errorf("recalled %d requests of 2, or not as they were", len(left))
	}
	if err := second.close(); err != nil {
		t.Error(err)
	}
}

func TestResumeRefuses(t *testing.T) {
	header := `{"version":1,"dir":"/x","id":"i","mode":"direct"}`
	for name, c := range map[string]struct {
		text  string
		check func(error) bool
	}{
		"no file":       {"", func(err error) bool { return errors.Is(err, os.ErrNotExist) }},
		"no JSON":       {"x", errdefs.IsDataLoss},
		"version":       {`{"version":2}`, errdefs.IsDataLoss},
		"no session":    {`{"version":1,"dir":"x"}`, errdefs.IsDataLoss},
		"pending":       {`{"version":1,"dir":"/x","id":"i","mode":"journal","pending":["YQ=="]}`, errdefs.IsDataLoss},
		"not connected": {header, func(err error) bool { return errors.Is(err, ErrEnded) }},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "session.json")
			if c.text != "" {
				if err := os.WriteFile(file, []byte(c.text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := Resume(file, aborted(t), nil); !c.check(err) {
				t.Errorf("error %v", err)
			}
		})
	}
}

// aborted is a descriptor whose session is over.
func aborted(t *testing.T) *os.File {
	t.Helper()
	s := open(t, Auto)
	f, err := s.Descriptor()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = f.Close() })
	return f
}

// A supervisor that was killed has not written down its workers. The next one
// must ask for what they took with them.
func TestResumeAfterKill(t *testing.T) {
	s := open(t, Auto)
	file := filepath.Join(t.TempDir(), "session.json")
	if err := s.keep(file); err != nil {
		t.Fatal(err)
	}
	fuse, err := s.Descriptor()
	if err != nil {
		t.Fatal(err)
	}
	next, err := Resume(file, fuse, nil)
	if err != nil {
		t.Fatal(err)
	}
	if next.workers != 1 {
		t.Errorf("%d workers before", next.workers)
	}
	if err := next.leave(); err != nil {
		t.Error(err)
	}
}
