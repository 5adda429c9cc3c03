package daemon

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strconv"

	"github.com/coreos/go-systemd/v22/activation"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/host/config"
	"github.com/tatami-containers/tatami/host/criproxy"
	"github.com/tatami-containers/tatami/rootfs/mount/session"
)

// What descriptors are called in systemd's store: the session's, and that of the
// memory of credentials.
const (
	fuseName   = "tatami-fuse"
	memoryName = criproxy.MemoryName
)

// inherited are the descriptors that systemd kept for us, by name
// (sd_listen_fds_with_names(3)).
func inherited(log *slog.Logger) map[string]*os.File {
	kept := map[string]*os.File{}
	for _, f := range activation.Files(true) {
		if name := f.Name(); (name == fuseName || name == memoryName) && kept[name] == nil {
			kept[name] = f
			continue
		}
		log.Warn("a descriptor from systemd is not used", "name", f.Name())
		_ = f.Close() // whatever it was
	}
	return kept
}

// stores tells whether a service manager holds descriptors (sd_pid_notify_with_fds(3),
// FDSTORE). Before version 254 of systemd it cannot be told how many (systemd.exec(5));
// a service without a store says so in systemd's log.
func stores() bool {
	n, err := strconv.Atoi(os.Getenv("FDSTORE"))
	return (err != nil || n > 0) && os.Getenv("NOTIFY_SOCKET") != ""
}

// store gives systemd the session to hold and says whether it does so.
func store(fuse *session.Session, log *slog.Logger) bool {
	if !stores() {
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

// openMemory returns the memory of credentials, when there shall be one: what systemd
// kept of it, or an empty one that systemd is given to hold.
func openMemory(cfg config.Config, kept *os.File, log *slog.Logger) (*os.File, error) {
	switch wanted := cfg.CRI.ImageService != ""; {
	case wanted && kept != nil:
		return kept, nil
	case !wanted && kept != nil:
		_ = kept.Close() // it is forgotten
		return nil, notify("FDSTOREREMOVE=1\nFDNAME=" + memoryName)
	case !wanted:
		return nil, nil
	}
	memory, err := criproxy.NewMemory()
	if err == nil && stores() {
		if err := notify("FDSTORE=1\nFDNAME="+memoryName, int(memory.Fd())); err != nil {
			log.Warn("systemd does not hold the credentials of pulls; they will not outlive this process", "error", err)
		}
	}
	return memory, err
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
