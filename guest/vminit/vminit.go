// Package vminit is the first process of a virtual machine of ours. It makes
// an initramfs into a system that containers can run on, starts one command
// (the supervisor), waits for orphans, and powers the machine off when the
// command ends.
//
// It reaps with wait4(-1) and so must never start a process through os/exec:
// the supervisor, which does, is a child, and orphans never become its.
package vminit

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// Config says what to set up.
type Config struct {
	Hostname string
	Net      Net
	// Share is where the virtio-fs with the tag "tatami" is mounted, if the machine
	// has one; "" for nowhere.
	Share string
	// Command is the supervisor's argument list; Command[0] is a path.
	Command []string
	Log     *slog.Logger
}

// initialPIDNamespace is the inode of the machine's own process namespace
// (PROC_PID_INIT_INO in the kernel's include/linux/proc_ns.h).
const initialPIDNamespace = 0xEFFFFFFC

// IsInit tells whether this process is the machine's init: process 1, started
// by the name "init". That alone may also be true of a process that was cloned
// into a process namespace of its own; Prepare checks further.
func IsInit() bool {
	return os.Getpid() == 1 && filepath.Base(os.Args[0]) == "init"
}

// Prepare mounts /proc, without which neither the configuration nor the next
// checks can be read, and refuses when this is not the machine's init.
func Prepare() error {
	if _, err := os.Stat("/proc/self/ns/pid"); err != nil {
		if err := mountOne(mountPoint{"proc", "proc", "/proc", secure, ""}); err != nil {
			return err
		}
	}
	var st unix.Stat_t
	if err := unix.Stat("/proc/self/ns/pid", &st); err != nil {
		return fmt.Errorf("look at the process namespace: %w", err)
	}
	if st.Ino != initialPIDNamespace {
		return fmt.Errorf("process 1 of a container is not the machine's init: name a role, such as %q", "tatami-guest supervisor")
	}
	return nil
}

// Run sets the machine up, runs the command and powers off when it has ended.
// It returns only when the power cannot be switched off.
func Run(cfg Config) error {
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if err := run(cfg); err != nil {
		cfg.Log.Error("init ends", "error", err)
	}
	return PowerOff()
}

func run(cfg Config) error {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT, unix.SIGPWR, unix.SIGCHLD)
	if err := setUp(cfg); err != nil {
		return err
	}
	pid, err := syscall.ForkExec(cfg.Command[0], cfg.Command, &syscall.ProcAttr{
		Dir: "/", Env: os.Environ(), Files: []uintptr{0, 1, 2},
	})
	if err != nil {
		return fmt.Errorf("start %s: %w", cfg.Command[0], err)
	}
	status := reap(pid, signals)
	if status.Exited() && status.ExitStatus() == 0 {
		return nil
	}
	return fmt.Errorf("supervisor ended: exit status %d, signal %v", status.ExitStatus(), status.Signal())
}

// reap waits for every child, known or not, until pid has ended. Signals that
// ask for the end are handed to pid.
func reap(pid int, signals <-chan os.Signal) unix.WaitStatus {
	for s := range signals {
		if s != unix.SIGCHLD {
			_ = unix.Kill(pid, unix.SIGTERM) // it may have just ended, which wait4 tells
			continue
		}
		// Signals coalesce: one SIGCHLD may stand for many children.
		for {
			var status unix.WaitStatus
			got, err := unix.Wait4(-1, &status, unix.WNOHANG, nil)
			if err == unix.EINTR {
				continue
			}
			if err != nil || got <= 0 {
				break
			}
			if got == pid {
				return status
			}
		}
	}
	return 0
}

// setUp runs the steps in order and logs once how long each took.
func setUp(cfg Config) error {
	steps := []struct {
		name string
		run  func() error
	}{
		{"root", leaveInitramfs},
		{"mounts", mountAll},
		{"modules", func() error { return loadModules(modulesDir, cfg.Log) }},
		{"share", func() error { return mountShare(cfg.Share, virtioDevices, cfg.Log) }},
		{"limits", setLimits},
		{"network", func() error { return setUpNetwork(cfg) }},
	}
	var phases []slog.Attr
	for _, s := range steps {
		start := time.Now()
		if err := s.run(); err != nil {
			return fmt.Errorf("init: %s: %w", s.name, err)
		}
		phases = append(phases, slog.String(s.name, time.Since(start).Round(time.Microsecond).String()))
	}
	phases = append(phases, slog.String("since_boot", sinceBoot().String()))
	cfg.Log.LogAttrs(context.Background(), slog.LevelInfo, "init done", phases...)
	return nil
}

func sinceBoot() time.Duration {
	var ts unix.Timespec
	if err := unix.ClockGettime(unix.CLOCK_BOOTTIME, &ts); err != nil {
		return 0
	}
	return time.Duration(ts.Nano()).Round(time.Millisecond)
}

// setLimits gives containers room for files, and the daemon a place behind
// them when memory ends: a dead daemon would stop them all.
func setLimits() error {
	files := unix.Rlimit{Cur: 1 << 20, Max: 1 << 20}
	if err := unix.Setrlimit(unix.RLIMIT_NOFILE, &files); err != nil {
		return fmt.Errorf("set the limit of open files: %w", err)
	}
	if err := os.WriteFile("/proc/self/oom_score_adj", []byte("-900"), 0); err != nil {
		return fmt.Errorf("set oom_score_adj: %w", err)
	}
	return os.Setenv("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
}

// PowerOff writes what is cached and switches the machine off.
func PowerOff() error {
	unix.Sync()
	if err := unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF); err != nil {
		return fmt.Errorf("power off: %w", err)
	}
	return nil
}
