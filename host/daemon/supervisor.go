package daemon

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/host/config"
	"github.com/tatami-containers/tatami/host/service"
	"github.com/tatami-containers/tatami/protocols/sharedimages"
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
	// Its path, not /proc/self/exe: after an upgrade another program is there.
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("find the program of workers: %w", err)
	}
	// The sockets first: without them the mounts of before stay as they are.
	sockets, err := listen(cfg)
	if err != nil {
		return err
	}
	defer sockets.close()
	readies, err := relayReady(log)
	if err != nil {
		return err
	}
	defer readies.Close()
	kept := inherited(log)
	memory, err := openMemory(cfg, kept[memoryName], log)
	if err != nil {
		return err
	}
	defer memory.Close() // nil, where there is none, is no file to close
	fuse, err := openSession(cfg, kept[fuseName], log)
	if err != nil {
		return err
	}
	keep := ""
	if store(fuse, log) {
		keep = sessionFile(cfg)
	}
	// What the supervisor holds belongs to these four, whatever the file says by
	// the time that a worker reads it.
	command := slices.Concat([]string{self}, args, []string{"--root", cfg.Root, "--state", cfg.State, "--socket", cfg.Socket, "--images-socket", cfg.ImagesSocket})
	return session.Supervise(ctx, session.SuperviseConfig{
		Session: fuse, Command: command, ExtraFiles: extraFiles(sockets.files, memory, readies),
		Restart: reloads(ctx, cfg, args, command, log), Keep: keep, Polite: true, Log: log,
		Cleanup: func(context.Context) error { return mount.Clean(cfg.State, log) },
	})
}

// extraFiles are what a worker inherits: sockets, the memory of credentials if there is
// one, and last where it says that it is ready.
func extraFiles(sockets []*os.File, memory, readies *os.File) []*os.File {
	files := slices.Clone(sockets)
	if memory != nil {
		files = append(files, memory)
	}
	return append(files, readies)
}

// openSession goes on with the session that an earlier supervisor left to
// systemd, or begins one.
func openSession(cfg config.Config, fuse *os.File, log *slog.Logger) (*session.Session, error) {
	if fuse != nil {
		s, err := session.Resume(sessionFile(cfg), fuse, log)
		if err == nil {
			return s, nil
		}
		log.Warn("the FUSE session of before cannot be resumed; what was mounted on it is dead", "error", err)
		unstore(log)
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
	files     []*os.File // as socketPaths
}

func listen(cfg config.Config) (*sockets, error) {
	s := &sockets{}
	for _, path := range socketPaths(cfg) {
		network := "unix"
		if path == cfg.ImagesSocket {
			network = sharedimages.Network
		}
		if err := s.add(network, path); err != nil {
			s.close()
			return nil, fmt.Errorf("open socket: %w", err)
		}
	}
	return s, nil
}

// socketPaths lists the control socket, that of virtio-fs devices, then one for
// each snapshotter, and that of the kubelet.
func socketPaths(cfg config.Config) []string {
	paths := []string{cfg.Socket, cfg.ImagesSocket}
	for _, sn := range cfg.Snapshotters {
		paths = append(paths, sn.Socket)
	}
	if cfg.CRI.ImageService != "" {
		paths = append(paths, cfg.CRI.ImageService)
	}
	return paths
}

func (s *sockets) add(network, path string) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o711); err != nil { //nolint:gosec // as above
		return err
	}
	l, err := vsock.ListenUnix(network, path)
	if err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	s.listeners = append(s.listeners, l)
	f, err := l.File()
	if err != nil {
		return err
	}
	defer f.Close()
	fd, err := unix.FcntlInt(f.Fd(), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return err
	}
	s.files = append(s.files, os.NewFile(uintptr(fd), path)) // a worker knows it by its path
	return nil
}

func (s *sockets) close() {
	for _, f := range s.files {
		_ = f.Close() // nothing was written
	}
	for _, l := range s.listeners {
		_ = l.Close() // removes the socket
	}
}

// checkTimeout bounds the reading of settings before a reload.
const checkTimeout = 10 * time.Second

// reloads asks for a new worker at each SIGHUP, if the program, as it is now,
// can read its settings: a worker that cannot would serve nobody.
func reloads(ctx context.Context, cfg config.Config, args, command []string, log *slog.Logger) <-chan struct{} {
	hangups, restart := session.Hangups(ctx), make(chan struct{})
	go func() { // ends with ctx
		for {
			select {
			case <-hangups:
			case <-ctx.Done():
				return
			}
			err := checkSettings(ctx, command)
			if err == nil {
				err = sameSockets(cfg, args)
			}
			if err != nil {
				log.Error("not reloaded; the worker goes on with the settings that it has", "error", err)
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

func checkSettings(ctx context.Context, command []string) error {
	ctx, cancel := context.WithTimeout(ctx, checkTimeout)
	defer cancel()
	args := slices.Concat(command[1:], []string{"--check"})
	if out, err := exec.CommandContext(ctx, command[0], args...).CombinedOutput(); err != nil {
		return fmt.Errorf("%s --check: %w: %.1000s", command[0], err, out)
	}
	return nil
}

// sameSockets refuses settings that need other sockets than the supervisor has.
// A file that only a newer program understands is left to that.
func sameSockets(cfg config.Config, args []string) error {
	now, err := config.Parse(args, io.Discard)
	if err != nil || now.State == cfg.State && now.Root == cfg.Root && slices.Equal(socketPaths(now), socketPaths(cfg)) {
		return nil
	}
	return fmt.Errorf("the settings have another root, state, or other snapshotters than when tatami-host was started; restart it: %w", errdefs.ErrFailedPrecondition)
}
