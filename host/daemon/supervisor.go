package daemon

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/host/config"
	"github.com/tatami-containers/tatami/host/service"
	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/rootfs/mount"
	"github.com/tatami-containers/tatami/rootfs/mount/session"
)

// supervise keeps a worker running until ctx ends. If somebody holds the FUSE
// session meanwhile, mounts stay; else they are undone.
func supervise(ctx context.Context, cfg config.Config, args []string, log *slog.Logger) error {
	if err := os.MkdirAll(cfg.State, 0o711); err != nil { //nolint:gosec // containerd's sockets are in it
		return fmt.Errorf("make state directory: %w", err)
	}
	// Before anything is cleaned up: it may be in use.
	lock, err := service.Lock(filepath.Join(cfg.State, "supervisor.lock"), cfg.Socket)
	if err != nil {
		return err
	}
	defer lock.Close()
	program, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find the program of workers: %w", err)
	}
	fuse, err := openSession(cfg, log)
	if err != nil {
		return err
	}
	sockets, err := listen(cfg)
	if err != nil {
		return errors.Join(err, fuse.Close())
	}
	defer sockets.close()
	readies, err := relayReady(log)
	if err != nil {
		return errors.Join(err, fuse.Close())
	}
	defer readies.Close()
	keep := ""
	if store(fuse, log) {
		keep = sessionFile(cfg)
	}
	return session.Supervise(ctx, session.SuperviseConfig{
		// By its path, not /proc/self/exe: an upgrade puts another program there.
		Session: fuse, Command: append([]string{program}, args...), ExtraFiles: append(sockets.files, readies),
		Restart: hangups(ctx, cfg, args, log), Keep: keep, Log: log,
		Cleanup: func(context.Context) error { return mount.Clean(cfg.State, log) },
	})
}

// openSession goes on with the session that an earlier supervisor left to
// systemd, or begins one.
func openSession(cfg config.Config, log *slog.Logger) (*session.Session, error) {
	if fuse := inherited(log); fuse != nil {
		s, err := session.Resume(sessionFile(cfg), fuse, log)
		if err == nil {
			return s, nil
		}
		log.Warn("the FUSE session of before cannot be resumed; what was mounted on it is dead", "error", err)
	}
	unstore(log)
	if err := mount.Clean(cfg.State, log); err != nil {
		log.Warn("clean up after an earlier tatami-host", "error", err)
	}
	return session.Open(session.Config{Dir: sessionDir(cfg), Mode: sessionMode(), Log: log})
}

// sockets are what containerd and tools connect to; connections wait in the
// kernel while there is no worker.
type sockets struct {
	listeners []net.Listener
	files     []*os.File // the control socket, then one for each snapshotter
}

func listen(cfg config.Config) (*sockets, error) {
	s := &sockets{}
	for _, path := range socketPaths(cfg) {
		if err := s.add(path); err != nil {
			s.close()
			return nil, fmt.Errorf("open socket: %w", err)
		}
	}
	return s, nil
}

// socketPaths lists the control socket, then one for each snapshotter.
func socketPaths(cfg config.Config) []string {
	paths := []string{cfg.Socket}
	for _, sn := range cfg.Snapshotters {
		paths = append(paths, sn.Socket)
	}
	return paths
}

func (s *sockets) add(path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil { //nolint:gosec // as above
		return err
	}
	l, err := vsock.Listen("unix:" + path)
	if err != nil {
		return err
	}
	s.listeners = append(s.listeners, l)
	filer, ok := l.(interface{ File() (*os.File, error) })
	if !ok {
		return fmt.Errorf("%s cannot be passed on: %w", path, errors.ErrUnsupported)
	}
	f, err := filer.File()
	if err == nil {
		s.files = append(s.files, f)
	}
	return err
}

func (s *sockets) close() {
	for _, f := range s.files {
		_ = f.Close() // nothing was written
	}
	for _, l := range s.listeners {
		_ = l.Close() // removes the socket
	}
}

// hangups asks for a new worker at each SIGHUP, unless that one could not work
// with the settings as they are now: then the present one stays.
func hangups(ctx context.Context, cfg config.Config, args []string, log *slog.Logger) <-chan struct{} {
	signals, restart := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(signals, unix.SIGHUP)
	go func() { // ends with ctx
		defer signal.Stop(signals)
		for {
			select {
			case <-signals:
			case <-ctx.Done():
				return
			}
			if err := checkSettings(cfg, args); err != nil {
				log.Error("the worker is not replaced", "error", err)
				continue
			}
			select {
			case restart <- struct{}{}:
			case <-ctx.Done():
				return
			}
		}
	}()
	return restart
}

// checkSettings reads the settings as a worker does and compares them with those
// that the supervisor has.
func checkSettings(cfg config.Config, args []string) error {
	now, err := config.Parse(args, io.Discard)
	if err != nil {
		return err
	}
	if now.Root != cfg.Root || now.State != cfg.State {
		return fmt.Errorf("root %s and state %s are others than when tatami-host was started; restart it: %w", now.Root, now.State, errdefs.ErrFailedPrecondition)
	}
	return sameSockets(socketPaths(cfg), socketPaths(now))
}

// sameSockets compares the sockets of the supervisor with those that settings
// name.
func sameSockets(have, want []string) error {
	if slices.Equal(have, want) {
		return nil
	}
	return fmt.Errorf("sockets %v, for which there are %v: the settings have other snapshotters than when tatami-host was started; restart it: %w",
		want, have, errdefs.ErrFailedPrecondition)
}
