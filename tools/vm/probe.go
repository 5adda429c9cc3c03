package vm

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// probeWait bounds the boot of a probe; with KVM that works it takes one second.
const probeWait = 10 * time.Second

const kvmDevice = "/dev/kvm"

// ProbeKVM tells whether guests boot on KVM here, and if not, why. Only a boot
// shows it: in clouds /dev/kvm may be there and fail for ordinary kernels. The
// verdict is kept in the cache for this boot of the machine, QEMU and kernel.
func ProbeKVM(ctx context.Context, qemu string, k Kernel) (good bool, reason string, err error) {
	f, err := os.OpenFile(kvmDevice, os.O_RDWR, 0)
	if err != nil {
		return false, err.Error(), nil
	}
	_ = f.Close() // opened only to see that it can be
	file, err := verdictFile(ctx, qemu, k)
	if err != nil {
		return false, "", fmt.Errorf("probe KVM: %w", err)
	}
	b, err := os.ReadFile(file)
	if err == nil {
		reason = string(b)
		return reason == "", reason, nil
	}
	if !errors.Is(err, fs.ErrNotExist) {
		return false, "", fmt.Errorf("probe KVM: %w", err)
	}
	if reason, err = probe(ctx, qemu, k); err != nil {
		return false, "", fmt.Errorf("probe KVM: %w", err)
	}
	_ = keepVerdict(file, reason) // the next start probes again
	return reason == "", reason, nil
}

func verdictFile(ctx context.Context, qemu string, k Kernel) (string, error) {
	cache, err := CacheDir()
	if err != nil {
		return "", err
	}
	boot, err := os.ReadFile("/proc/sys/kernel/random/boot_id")
	if err != nil {
		return "", err
	}
	version, err := exec.CommandContext(ctx, qemu, "--version").Output()
	if err != nil {
		return "", fmt.Errorf("%s --version: %w", qemu, err)
	}
	sum := sha256.Sum256([]byte(strings.Join([]string{string(boot), string(version), k.Image, k.Release}, "\x00")))
	return filepath.Join(cache, fmt.Sprintf("kvm-%x", sum[:8])), nil
}

// keepVerdict writes a file that is whole when it appears.
func keepVerdict(file, reason string) error {
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	tmp := fmt.Sprintf("%s.%d", file, os.Getpid())
	if err := os.WriteFile(tmp, []byte(reason), 0o644); err != nil {
		return err
	}
	return os.Rename(tmp, file)
}

// probe boots the kernel without a root file system: a kernel that gets as far as
// to miss that has run. The reason is empty when it did.
func probe(ctx context.Context, qemu string, k Kernel) (reason string, err error) {
	limited, cancel := context.WithTimeout(ctx, probeWait)
	defer cancel()
	cfg := Config{Kernel: k, MemoryMiB: 256, CPUs: 1}
	cmd := exec.CommandContext(limited, qemu, append(machine(&cfg, AccelKVM), "-no-reboot")...)
	out, runErr := cmd.CombinedOutput()
	if ctx.Err() != nil {
		return "", context.Cause(ctx)
	}
	for _, sign := range []string{"Unable to mount root fs", "No working init found"} {
		if strings.Contains(string(out), sign) {
			return "", nil
		}
	}
	if limited.Err() != nil {
		return fmt.Sprintf("no guest booted on KVM in %v", probeWait), nil
	}
	return fmt.Sprintf("no guest booted on KVM (%v): %s", runErr, lastLines(string(out), 3)), nil
}
