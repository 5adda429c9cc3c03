package vminit

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// TestMain lets the test binary play process 1 of a process namespace.
func TestMain(m *testing.M) {
	switch os.Getenv("VMINIT_ROLE") {
	case "prepare":
		if !IsInit() {
			fmt.Println("IsInit is false")
			os.Exit(3)
		}
		fmt.Println(Prepare())
		os.Exit(0)
	case "reap":
		os.Exit(reapRole())
	case "root":
		os.Exit(rootRole())
	}
	os.Exit(m.Run())
}

// asInit runs this binary as process 1 named "init" in namespaces of its own.
func asInit(t *testing.T, role string) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: makes namespaces")
	}
	cmd := exec.CommandContext(t.Context(), "/proc/self/exe")
	cmd.Args[0] = "/init"
	cmd.Env = append(os.Environ(), "VMINIT_ROLE="+role, "VMINIT_DIR="+t.TempDir())
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	return string(out)
}

func TestAClonedProcessIsNotInit(t *testing.T) {
	if out := asInit(t, "prepare"); !strings.Contains(out, "not the machine's init") {
		t.Errorf("Prepare said %q", out)
	}
}

func TestReapsOrphansAndTellsTheSupervisorsEnd(t *testing.T) {
	if out := asInit(t, "reap"); strings.TrimSpace(out) != "exit 7, children left false" {
		t.Error(out)
	}
}

// reapRole starts a shell that leaves orphans behind, asks it to end by a
// signal, and ends with 7.
func reapRole() int {
	signals := make(chan os.Signal, 8)
	signal.Notify(signals, unix.SIGTERM, unix.SIGCHLD)
	const script = `trap 'exit 7' TERM; (for i in 1 2 3 4 5; do (exit 0) & done; (true & exit 0) & exit 0); kill -TERM 1; while :; do sleep 0.01; done`
	pid, err := syscall.ForkExec("/bin/sh", []string{"sh", "-c", script}, &syscall.ProcAttr{Files: []uintptr{0, 1, 2}})
	if err != nil {
		fmt.Println(err)
		return 1
	}
	status := reap(pid, signals)
	// Orphans may end after the shell; none may be left unreaped for good.
	for {
		_, err := unix.Wait4(-1, nil, 0, nil)
		if !errors.Is(err, unix.EINTR) && err != nil {
			fmt.Printf("exit %d, children left %v\n", status.ExitStatus(), !errors.Is(err, unix.ECHILD))
			return 0
		}
	}
}

func TestPivotRootWorksAfterLeavingTheRoot(t *testing.T) {
	if out := asInit(t, "root"); strings.TrimSpace(out) != "pivot_root: <nil>, file kept: true" {
		t.Error(out)
	}
}

// rootRole leaves a tmpfs root as it leaves an initramfs, then pivots.
func rootRole() int {
	dir := os.Getenv("VMINIT_DIR")
	steps := []func() error{
		func() error { return unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "") },
		func() error { return unix.Mount("t", dir, "tmpfs", 0, "") },
		func() error { return os.WriteFile(filepath.Join(dir, "kept"), nil, 0o600) },
		func() error { return unix.Chroot(dir) },
		func() error { return os.Chdir("/") },
		leaveInitramfs,
		func() error { return os.Mkdir("/c", 0o755) },
		func() error { return unix.Mount("c", "/c", "tmpfs", 0, "") },
		func() error { return os.Chdir("/c") },
	}
	for i, s := range steps {
		if err := s(); err != nil {
			fmt.Println("step", i, err)
			return 1
		}
	}
	_, err := os.Stat("/kept")
	fmt.Printf("pivot_root: %v, file kept: %v\n", unix.PivotRoot(".", "."), err == nil)
	return 0
}

func TestLoadModules(t *testing.T) {
	log := slog.New(slog.DiscardHandler)
	cases := []struct {
		name, order, wantErr string
	}{
		{name: "nothing to load"},
		{name: "a missing file is a warning", order: "kernel/none.ko\n"},
		{name: "outside", order: "../evil.ko\n", wantErr: "not a path below"},
		{name: "absolute", order: "/evil.ko\n", wantErr: "not a path below"},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			dir := t.TempDir()
			if c.order != "" {
				if err := os.WriteFile(filepath.Join(dir, orderFile), []byte(c.order), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			err := loadModules(dir, log)
			if (err == nil) != (c.wantErr == "") || err != nil && !strings.Contains(err.Error(), c.wantErr) {
				t.Errorf("error %v, want %q", err, c.wantErr)
			}
		})
	}
}
