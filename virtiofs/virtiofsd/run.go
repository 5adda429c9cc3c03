// Package virtiofsd is tatami-virtiofsd: one process for each virtual machine,
// which shows it the image files of one directory (package virtiofs) and ends with
// the VMM's connection. Usage and limits are in its help text.
package virtiofsd

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"log/syslog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/tatami-containers/tatami/virtiofs"
	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
	"golang.org/x/sys/unix"
)

// waiting is the line that Kata's runtime-rs waits for on standard error (its
// crates/resource/src/share_fs/share_virtio_fs_standalone.rs).
const waiting = "Waiting for vhost-user socket connection..."

// Run serves one VMM: it returns nil when that has left or ctx has ended. Lines
// that Kata reads go to stderr. The process has no privileges afterwards.
func Run(ctx context.Context, o *Options, stderr io.Writer) error {
	log := logger(o, stderr)
	if len(o.Notes) > 0 {
		log.Info("options without effect here", "options", strings.Join(o.Notes, " "))
	}
	l, err := listen(o)
	if err != nil {
		return err
	}
	defer l.Close()
	imgs, err := openImages(o.SharedDir, log)
	if err != nil {
		return err
	}
	fmt.Fprintln(stderr, waiting)
	c, err := virtiofs.Accept(ctx, l)
	switch {
	case err == nil:
		err = serve(ctx, o, imgs, c, log)
	case ctx.Err() != nil:
		err = nil
	}
	return errors.Join(err, imgs.close())
}

// serve gives up all privileges before it reads the first message.
func serve(ctx context.Context, o *Options, imgs *images, c *net.UnixConn, log *slog.Logger) error {
	landlock, err := confine(imgs.dir)
	if err != nil {
		return errors.Join(err, c.Close())
	}
	srv, err := virtiofs.New(virtiofs.Config{Directory: imgs.out, Tag: o.Tag, Cached: o.Cache == "always", Log: log})
	if err != nil {
		return errors.Join(err, c.Close())
	}
	log.Info("VMM is connected", "dir", o.SharedDir, "landlock", landlock)
	var following sync.WaitGroup
	following.Go(imgs.follow)
	err = srv.Serve(ctx, c)
	log.Info("VMM has left", "stats", srv.Stats())
	_ = imgs.watch.SetReadDeadline(time.Unix(1, 0)) // ends follow
	following.Wait()
	return err
}

func listen(o *Options) (*net.UnixListener, error) {
	if o.FD >= 0 {
		return vhostuser.ListenerFromFD(o.FD)
	}
	if err := removeStale(o.SocketPath); err != nil {
		return nil, err
	}
	// No time in which others could connect.
	old := unix.Umask(0o177)
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: o.SocketPath, Net: "unix"})
	unix.Umask(old)
	if err != nil {
		return nil, fmt.Errorf("make socket for the VMM: %w", err)
	}
	return l, nil
}

// removeStale removes what a process before has left.
func removeStale(path string) error {
	st, err := os.Lstat(path)
	if errors.Is(err, os.ErrNotExist) || err == nil && st.Mode().Type() != os.ModeSocket {
		return nil // listening reports what else is there
	}
	if err == nil {
		err = os.Remove(path)
	}
	if err != nil {
		return fmt.Errorf("remove old socket: %w", err)
	}
	return nil
}

func logger(o *Options, stderr io.Writer) *slog.Logger {
	level := slog.LevelInfo
	if o.Debug {
		level = slog.LevelDebug
	}
	out := stderr
	if o.Syslog {
		w, err := syslog.New(syslog.LOG_INFO|syslog.LOG_DAEMON, "tatami-virtiofsd")
		if err == nil {
			out = w
		} else {
			fmt.Fprintln(stderr, "tatami-virtiofsd: no syslog, logging here:", err)
		}
	}
	return slog.New(slog.NewJSONHandler(out, &slog.HandlerOptions{Level: level}))
}
