package daemon

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/host/config"
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
	fuse, err := openSession(cfg, log)
	if err != nil {
		return err
	}
	sockets, err := listen(cfg)
	if err != nil {
		return errors.Join(err, fuse.Close())
	}
	defer sockets.close()
	keep := ""
	if store(fuse, log) {
		keep = sessionFile(cfg)
	}
	return session.Supervise(ctx, session.SuperviseConfig{
		Session: fuse, Command: append([]string{"/proc/self/exe"}, args...), ExtraFiles: sockets.files,
		Restart: hangups(ctx), Keep: keep, Log: log,
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
		unstore(log)
	}
	if err := mount.Clean(cfg.State, log); err != nil {
		log.Warn("clean up after an earlier tatami-host", "error", err)
	}
	return session.Open(session.Config{Dir: sessionDir(cfg), Log: log})
}

// sockets are what containerd and tools connect to; connections wait in the
// kernel while there is no worker.
type sockets struct {
	listeners []net.Listener
	files     []*os.File // the control socket, then one for each snapshotter
}

func listen(cfg config.Config) (*sockets, error) {
	s := &sockets{}
	paths := []string{cfg.Socket}
	for _, sn := range cfg.Snapshotters {
		paths = append(paths, sn.Socket)
	}
	for _, path := range paths {
		if err := s.add(path); err != nil {
			s.close()
			return nil, fmt.Errorf("open socket: %w", err)
		}
	}
	return s, nil
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

// hangups asks for a new worker at each SIGHUP.
func hangups(ctx context.Context) <-chan struct{} {
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
			select {
			case restart <- struct{}{}:
			case <-ctx.Done():
				return
			}
		}
	}()
	return restart
}
