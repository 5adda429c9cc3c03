package mount

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/mount/imagefs"
	"github.com/tatami-containers/tatami/rootfs/mount/session"
)

// workerEnv makes the test binary a worker; its value is a workerConfig.
const workerEnv = "TATAMI_TEST_WORKER"

type workerConfig struct {
	StateDir string
	Prefer   Path
	Delay    time.Duration // of each read
	Stick    string        // reads hang while this file exists
	Keep     bool          // SIGTERM leaves mounts alone
}

// order is what the test tells a worker, over a socket that outlives it.
type order struct {
	Op     string // mount, unmount, list, switch, stats
	Spec   orderSpec
	Path   string
	Digest digest.Digest
}

type orderSpec struct{ ID, Image, Local, Target, Upper string }

type answer struct {
	Err      string
	Records  []Record
	Stats    imagefs.Stats
	Pid      int
	Restarts int
}

func workerMain() int {
	if err := runWorker(); err != nil {
		fmt.Fprintln(os.Stderr, "worker:", err)
		return 1
	}
	return 0
}

func runWorker() error {
	var cfg workerConfig
	if err := json.Unmarshal([]byte(os.Getenv(workerEnv)), &cfg); err != nil {
		return err
	}
	link, err := session.Inherit()
	if err != nil {
		return err
	}
	ln, err := net.FileListener(link.Extra()[0])
	if err != nil {
		return err
	}
	level := slog.LevelError
	m, err := New(Config{StateDir: cfg.StateDir, Link: link, Prefer: cfg.Prefer, Log: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))})
	if err != nil {
		return err
	}
	w := &testWorker{cfg: cfg, m: m, link: link}
	if err := m.Restore(context.Background(), func(r Record) (File, error) { return w.open(r.Reference) }); err != nil {
		return err
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go w.accept(ctx, ln)
	term := make(chan os.Signal, 1)
	signal.Notify(term, syscall.SIGTERM)
	go func() {
		<-term
		uctx, ucancel := context.WithTimeout(ctx, 5*time.Second)
		defer ucancel()
		if !cfg.Keep {
			_ = m.UnmountAll(uctx)
		}
		cancel()
	}()
	err = m.Serve(ctx)
	if errors.Is(err, session.ErrEnded) {
		return nil
	}
	return err
}

type testWorker struct {
	cfg  workerConfig
	m    *Mounter
	link *session.Link
}

func (w *testWorker) open(path string) (File, error) {
	f, err := openDisk(path)
	if err != nil {
		return nil, err
	}
	f.delay = w.cfg.Delay
	if w.cfg.Stick != "" {
		stick := func(ctx context.Context) {
			for ctx.Err() == nil {
				if _, err := os.Stat(w.cfg.Stick); err != nil {
					return
				}
				_ = os.WriteFile(w.cfg.Stick+".hit", nil, 0o600)
				time.Sleep(5 * time.Millisecond)
			}
		}
		f.before.Store(&stick)
	}
	return f, nil
}

func (w *testWorker) accept(ctx context.Context, ln net.Listener) {
	for {
		c, err := ln.Accept()
		if err != nil {
			return
		}
		go func() {
			defer func() { _ = c.Close() }()
			var o order
			if json.NewDecoder(c).Decode(&o) != nil {
				return
			}
			a, err := w.obey(ctx, o)
			if err != nil {
				a.Err = err.Error()
			}
			a.Pid, a.Restarts = os.Getpid(), w.link.Restarts()
			_ = json.NewEncoder(c).Encode(a)
		}()
	}
}

func (w *testWorker) obey(ctx context.Context, o order) (answer, error) {
	switch o.Op {
	case "mount":
		spec := Spec{ID: o.Spec.ID, Reference: o.Spec.Image, Manifest: o.Digest, Local: o.Spec.Local, Target: o.Spec.Target, Upper: o.Spec.Upper}
		if spec.Local == "" {
			f, err := w.open(o.Spec.Image)
			if err != nil {
				return answer{}, err
			}
			spec.Image = f
		}
		rec, err := w.m.Mount(ctx, spec)
		return answer{Records: []Record{rec}}, err
	case "unmount":
		return answer{}, w.m.Unmount(ctx, o.Spec.ID)
	case "switch":
		return answer{}, w.m.SwitchToLocal(ctx, o.Digest, o.Path)
	case "list", "stats":
		return answer{Records: w.m.List(), Stats: w.m.Stats()}, nil
	}
	return answer{}, fmt.Errorf("order %q", o.Op)
}

// supervised is a session whose worker is another process.
type supervised struct {
	t        testing.TB
	dir      string
	session  *session.Session
	socket   string
	restarts atomic.Int64
	cancel   context.CancelFunc
	done     chan struct{}
	err      error // after done
}

func supervise(t testing.TB, mode session.Mode, cfg workerConfig, change ...func(*session.SuperviseConfig)) *supervised {
	t.Helper()
	needRoot(t)
	dir, err := os.MkdirTemp("/tmp", "mnt") //nolint:usetesting // not on a file system that a test mounts, and short
	check(t, err)
	s := &supervised{t: t, dir: dir, socket: filepath.Join(dir, "control"), done: make(chan struct{})}
	s.session, err = session.Open(session.Config{Dir: filepath.Join(dir, "session"), Mode: mode})
	if mode == session.Direct && errdefs.IsFailedPrecondition(err) {
		t.Skipf("needs a newer kernel: %v", err)
	}
	check(t, err)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: s.socket})
	check(t, err)
	lf, err := ln.File()
	check(t, err)
	t.Cleanup(func() { _ = lf.Close(); _ = ln.Close() })
	cfg.StateDir = filepath.Join(dir, "state")
	v, err := json.Marshal(cfg)
	check(t, err)
	sc := session.SuperviseConfig{
		Session: s.session, Command: []string{"/proc/self/exe"},
		Env:        append(os.Environ(), workerEnv+"="+string(v)),
		ExtraFiles: []*os.File{lf}, Restarts: &s.restarts,
		Cleanup: func(context.Context) error { return Clean(cfg.StateDir, nil) },
	}
	for _, c := range change {
		c(&sc)
	}
	ctx, cancel := context.WithCancel(context.Background())
	s.cancel = cancel
	go func() {
		defer close(s.done)
		s.err = session.Supervise(ctx, sc)
	}()
	t.Cleanup(func() {
		if err := s.stop(); err != nil && !errors.Is(err, session.ErrEnded) {
			t.Error(err)
		}
		check(t, os.RemoveAll(dir))
	})
	return s
}

func (s *supervised) stop() error {
	s.cancel()
	<-s.done
	return s.err
}

// order asks the worker, or the next one if it dies meanwhile.
func (s *supervised) order(o order) (answer, error) {
	for range 200 {
		c, err := net.Dial("unix", s.socket)
		if err != nil {
			return answer{}, err
		}
		var a answer
		if err = json.NewEncoder(c).Encode(o); err == nil {
			err = json.NewDecoder(c).Decode(&a)
		}
		_ = c.Close()
		if err == nil {
			if a.Err != "" {
				return a, errors.New(a.Err)
			}
			return a, nil
		}
		time.Sleep(10 * time.Millisecond)
	}
	return answer{}, errors.New("no worker answers")
}

func (s *supervised) mount(img *testImage, id string) Record {
	s.t.Helper()
	a, err := s.order(order{Op: "mount", Digest: img.manifest, Spec: orderSpec{ID: id, Image: img.path, Target: filepath.Join(s.dir, "target-"+id)}})
	check(s.t, err)
	return a.Records[0]
}

// kill ends the worker by force and returns its process id.
func (s *supervised) kill() int {
	s.t.Helper()
	a, err := s.order(order{Op: "stats"})
	check(s.t, err)
	check(s.t, unix.Kill(a.Pid, unix.SIGKILL))
	return a.Pid
}
