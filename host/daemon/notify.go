package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/mount/session"
)

// fuseName is what the session's descriptor is called in systemd's store.
const fuseName = "tatami-fuse"

// inherited is the session's descriptor that systemd kept for us, if it did
// (sd_listen_fds_with_names(3)).
func inherited(log *slog.Logger) *os.File {
	var fuse *os.File
	for _, f := range activation.Files(true) {
		if f.Name() == fuseName && fuse == nil {
			fuse = f
			continue
		}
		log.Warn("a descriptor from systemd is not used", "name", f.Name())
		_ = f.Close() // whatever it was
	}
	return fuse
}

// store gives systemd the session to hold (sd_pid_notify_with_fds(3), FDSTORE)
// and says whether it does so.
func store(fuse *session.Session, log *slog.Logger) bool {
	// systemd.exec(5): how many it would hold, since version 254. Before, it
	// cannot be told; a service without a store says so in systemd's log.
	if n, err := strconv.Atoi(os.Getenv("FDSTORE")); err == nil && n == 0 || os.Getenv("NOTIFY_SOCKET") == "" {
		return false
	}
	f, err := fuse.Descriptor()
	if err == nil {
		defer f.Close()
		err = notify("FDSTORE=1\nFDNAME="+fuseName, int(f.Fd()))
	}
	if err != nil {
		log.Warn("systemd does not hold the FUSE session; mounts will not outlive this process", "error", err)
	}
	return err == nil
}

// unstore makes systemd let go of sessions that it holds: as long as it has one,
// readers of what was mounted there wait instead of failing, and it would be
// passed on beside the next one.
func unstore(log *slog.Logger) {
	if err := notify("FDSTOREREMOVE=1\nFDNAME=" + fuseName); err != nil && !errors.Is(err, errNoManager) {
		log.Warn("systemd may still hold an earlier FUSE session; processes that read on it hang", "error", err)
	}
}

// ready tells systemd, if there is one, that everything serves.
func ready(log *slog.Logger) {
	if err := notify("READY=1"); err != nil && !errors.Is(err, errNoManager) {
		log.Warn("systemd cannot be told that tatami-host is ready", "error", err)
	}
}

// relayReady returns a pipe's end for workers to say in that they are ready, and
// passes that on. A service manager listens to the service's main process only,
// unless it is told to believe every process of the service (NotifyAccess= in
// systemd.service(5)), also those that workers run.
func relayReady(log *slog.Logger) (*os.File, error) {
	r, w, err := os.Pipe()
	if err != nil {
		return nil, fmt.Errorf("make pipe to workers: %w", err)
	}
	go func() { // ends when no process has w any more
		defer r.Close()
		var b [1]byte
		for {
			if n, err := r.Read(b[:]); n == 0 || err != nil {
				return
			}
			ready(log)
		}
	}()
	return w, nil
}

// sayReady tells the supervisor's relayReady.
func sayReady(w *os.File, log *slog.Logger) {
	if _, err := w.Write([]byte{1}); err != nil {
		log.Warn("the supervisor cannot be told that the worker is ready", "error", err)
	}
}

var errNoManager = errors.New("no service manager listens (NOTIFY_SOCKET)")

// notify sends a state to the service manager, with descriptors
// (sd_notify(3): one datagram to the socket in NOTIFY_SOCKET).
func notify(state string, fds ...int) error {
	path := os.Getenv("NOTIFY_SOCKET")
	if path == "" {
		return errNoManager
	}
	fd, err := unix.Socket(unix.AF_UNIX, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("notify service manager: %w", err)
	}
	defer unix.Close(fd)
	var rights []byte
	if len(fds) > 0 {
		rights = unix.UnixRights(fds...)
	}
	// Not by package net, which sends no descriptors from a connected datagram
	// socket. A name that begins with "@" is abstract there as here.
	if err := unix.Sendmsg(fd, []byte(state), rights, &unix.SockaddrUnix{Name: path}, 0); err != nil {
		return fmt.Errorf("notify service manager: send to %s: %w", path, err)
	}
	return nil
}
