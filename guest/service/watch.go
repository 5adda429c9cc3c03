package service

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"path/filepath"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/guest/images"
	"github.com/tatami-containers/tatami/rootfs/mount"
)

// hold keeps the configuration of an image, and prune away from the image until
// release is called.
func (g *Guest) hold(img *images.Image) (release func(), err error) {
	m := img.Manifest
	g.mu.Lock()
	defer g.mu.Unlock()
	if err := g.configs.put(m, img.Config); err != nil {
		return nil, fmt.Errorf("keep the configuration: %w", err)
	}
	g.held[m]++
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		if g.held[m]--; g.held[m] == 0 {
			delete(g.held, m)
		}
	}, nil
}

// enter keeps prune away from what is not known yet to belong to an image, until the
// result is called.
func (g *Guest) enter() (leave func()) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.busy++
	return func() {
		g.mu.Lock()
		defer g.mu.Unlock()
		g.busy--
	}
}

// prune removes what is kept for images that are mounted no more. What cannot
// be removed now, because somebody still reads it, the next call removes.
func (g *Guest) prune() {
	g.mu.Lock()
	defer g.mu.Unlock()
	used := make(map[digest.Digest]bool)
	for m := range g.held {
		used[m] = true
	}
	mounts := g.all()
	for _, m := range mounts {
		used[digest.Digest(m.ManifestDigest)] = true
	}
	g.starts.keepOnly(mounts)
	if err := g.configs.keepOnly(used); err != nil {
		g.cfg.Log.Warn("remove configurations", "error", err)
	}
	if g.busy == 0 {
		g.pruneLayers(used)
	}
	g.pinMounted()
	if g.cfg.Keep {
		return
	}
	for _, img := range g.cfg.Store.Images() {
		if img.Open || used[img.Manifest] {
			continue
		}
		if err := g.cfg.Store.Remove(img.Manifest); err != nil && !errdefs.IsFailedPrecondition(err) && !errdefs.IsNotFound(err) {
			g.cfg.Log.Warn("remove image", "manifest", img.Manifest, "error", err)
		}
	}
}

// pinMounted keeps the store from giving up complete files that mounts read without
// it.
func (g *Guest) pinMounted() {
	g.pinning.Lock() // no older look wins
	defer g.pinning.Unlock()
	var used []digest.Digest
	for _, m := range g.all() {
		used = append(used, digest.Digest(m.ManifestDigest))
	}
	g.cfg.Store.SetPinned(used...)
}

// pruneLayers leaves of layers' indexes those of the given images. Precondition: no
// mount is under way.
func (g *Guest) pruneLayers(used map[digest.Digest]bool) {
	layers := make(map[digest.Digest]bool)
	for _, img := range g.cfg.Store.Images() {
		for _, l := range img.Layers {
			layers[l] = layers[l] || used[img.Manifest] || img.Open
		}
	}
	if err := g.cfg.Images.KeepLayers(layers); err != nil {
		g.cfg.Log.Warn("remove indexes of layers", "error", err)
	}
}

// Watch cleans up after mounts that somebody else has unmounted, until ctx
// ends. kata-agent unmounts a container's root file system by itself and tells
// nobody.
func (g *Guest) Watch(ctx context.Context) error {
	info, err := unix.Open("/proc/self/mountinfo", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("watch mounts: %w", err)
	}
	defer unix.Close(info)
	wake, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		return fmt.Errorf("watch mounts: %w", err)
	}
	defer unix.Close(wake)
	woken := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(woken)
		_, _ = unix.Write(wake, binary.NativeEndian.AppendUint64(nil, 1)) // never blocks the first time
	})
	defer func() {
		if !stop() {
			<-woken
		}
	}()
	// The kernel marks a changed mount table as an exception (proc(5)).
	fds := []unix.PollFd{{Fd: int32(info), Events: unix.POLLPRI}, {Fd: int32(wake), Events: unix.POLLIN}}
	var pace mount.Pace
	g.sweep(ctx) // what was unmounted while nobody watched
	for ctx.Err() == nil {
		if _, err := unix.Poll(fds, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("watch mounts: %w", err)
		}
		select {
		case <-ctx.Done():
		case <-time.After(pace.Wait()):
			pace.Time(func() { g.sweep(ctx) })
		}
	}
	return nil
}

func (g *Guest) sweep(ctx context.Context) {
	n, err := g.cfg.Mounter.Sweep(ctx)
	if err = errors.Join(err, g.cfg.Unpacked.Sweep(ctx)); err != nil && ctx.Err() == nil {
		g.cfg.Log.Warn("clean up after unmounted containers", "error", err)
	}
	if n > 0 {
		g.cfg.Log.Info("cleaned up after unmounted containers", "mounts", n)
	}
	g.prune()
}

// target returns where a mount is.
func (g *Guest) target(id string) (string, error) {
	m, ok := g.find(id)
	if !ok {
		return "", fmt.Errorf("mount %q: no such mount: %w", id, errdefs.ErrNotFound)
	}
	return filepath.Clean(m.Target), nil
}
