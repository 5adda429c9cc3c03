package mount

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"
)

// WatchMounts sweeps whenever the kernel's mount table changes, until ctx is
// done (nil). It is for callers that unmount a target by themselves, as the
// Kata agent does.
func (m *Mounter) WatchMounts(ctx context.Context) error {
	info, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("watch mounts: %w", err)
	}
	defer func() { _ = unix.Close(info) }()
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("watch mounts: %w", err)
	}
	defer func() { _ = unix.Close(wake) }()
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		_, _ = unix.Write(wake, binary.NativeEndian.AppendUint64(nil, 1))
	})
	defer func() {
		if !stop() {
			<-woken // wake is closed after it was written
		}
	}()
	return m.watch(ctx, []unix.PollFd{{Fd: int32(info), Events: unix.POLLPRI}, {Fd: int32(wake), Events: unix.POLLIN}})
}

func (m *Mounter) watch(ctx context.Context, fds []unix.PollFd) error {
	var pace Pace
	for {
		_, err := unix.Poll(fds, -1)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("watch mounts: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-time.After(pace.Wait()):
		}
		pace.Time(func() {
			if _, err := m.Sweep(ctx); err != nil {
				m.logUndone("release unmounted images", err)
			}
		})
	}
}
