package service

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/guest/images"
	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/rootfs/image"
	"github.com/tatami-containers/tatami/rootfs/mount"
	"github.com/tatami-containers/tatami/rootfs/store"
)

// find returns a mount as lists show it, without what only the store knows.
func (g *Guest) find(id string) (*api.Mount, bool) {
	for _, m := range g.all() {
		if m.Id == id {
			return m, true
		}
	}
	return nil, false
}

// all lists the mounts of both kinds by id.
func (g *Guest) all() []*api.Mount {
	var all []*api.Mount
	for _, r := range g.cfg.Mounter.List() {
		if r.State == mount.Mounted {
			all = append(all, &api.Mount{Id: r.ID, Reference: r.Reference, ManifestDigest: r.Manifest.String(), Target: r.Target, Path: string(r.Path),
				Source: r.Source, ImageSize: r.Size})
		}
	}
	for _, r := range g.cfg.Unpacked.List() {
		all = append(all, &api.Mount{Id: r.ID, Reference: r.Reference, ManifestDigest: r.Manifest.String(), Target: r.Target, Path: pathUnpacked,
			Source: r.Source, ImageSize: r.Size, Present: r.Size, Complete: true})
	}
	slices.SortFunc(all, func(a, b *api.Mount) int { return strings.Compare(a.Id, b.Id) })
	return all
}

// isDirect says whether the kernel reads the image of a mount by itself.
func (g *Guest) isDirect(m *api.Mount) bool {
	return slices.ContainsFunc(g.cfg.Mounter.List(), func(r mount.Record) bool { return r.ID == m.Id && r.Local != "" })
}

func sameImage(a, b string) bool {
	na, err := image.ParseReference(a)
	if err != nil {
		return false
	}
	nb, err := image.ParseReference(b)
	return err == nil && na.String() == nb.String()
}

// List tells what is mounted and how much of it is here.
func (g *Guest) List(ctx context.Context, _ *api.ListRequest) (*api.ListResponse, error) {
	resp := &api.ListResponse{Mounts: g.all()}
	for _, m := range resp.Mounts {
		if m.Path == pathUnpacked || g.isDirect(m) {
			continue
		}
		img, err := g.open(ctx, m.Reference, digest.Digest(m.ManifestDigest), m.ImageSize)
		if err != nil {
			return nil, fmt.Errorf("list %s: %w", m.Id, err)
		}
		m.ImageSize, m.Present, m.Complete = img.Size(), img.Present(), img.Complete()
		_ = img.Close() // nothing was written
	}
	return resp, nil
}

// Stats are the counters since the process started.
func (g *Guest) Stats(context.Context, *api.StatsRequest) (*api.StatsResponse, error) {
	s := g.cfg.Store.Stats()
	resp := &api.StatsResponse{
		Hits: s.Hits, HitBytes: s.HitBytes, Misses: s.Misses, MissBytes: s.MissBytes,
		WaitUs: s.Wait.Microseconds(), VerifyFailures: s.VerifyFailures, Restarts: int64(g.cfg.Restarts),
		ReplayedBytes: s.Replayed, ReplayUsedBytes: s.ReplayUsed, ReplayWastedBytes: s.ReplayWasted,
	}
	for _, src := range s.Sources {
		resp.Sources = append(resp.Sources, sourceStats(src))
	}
	resp.Sources = addDirect(resp.Sources, g.direct.Load())
	var err error
	if resp.ResidentBytes, err = resident(); err != nil {
		return nil, fmt.Errorf("read resident memory: %w", err)
	}
	return resp, nil
}

func sourceStats(s store.SourceStats) *api.SourceStats {
	return &api.SourceStats{Name: s.Name, Requests: s.Requests, Bytes: s.Bytes, Errors: s.Errors}
}

// addDirect counts mounts of the node's image files: their bytes pass nobody who
// could count them.
func addDirect(all []*api.SourceStats, mounts int64) []*api.SourceStats {
	if mounts == 0 {
		return all
	}
	i := slices.IndexFunc(all, func(s *api.SourceStats) bool { return s.Name == images.SourceVirtioFS })
	if i < 0 {
		return append([]*api.SourceStats{{Name: images.SourceVirtioFS, Requests: mounts}}, all...)
	}
	all[i].Requests += mounts
	return all
}

// resident is the second field of statm (proc(5)), in pages.
func resident() (int64, error) {
	b, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, err
	}
	fields := bytes.Fields(b)
	if len(fields) < 2 {
		return 0, fmt.Errorf("%q has no second field", b)
	}
	pages, err := strconv.ParseInt(string(fields[1]), 10, 64)
	return pages * int64(os.Getpagesize()), err
}

// Health answers as soon as there is somebody to.
func (g *Guest) Health(ctx context.Context, _ *api.HealthRequest) (*api.HealthResponse, error) {
	resp := &api.HealthResponse{Version: g.cfg.Version, UptimeUs: time.Since(g.started).Microseconds()}
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return nil, fmt.Errorf("read the kernel's release: %w", err)
	}
	resp.Kernel = unix.ByteSliceToString(uts.Release[:])
	paths, err := g.cfg.Mounter.Paths(ctx)
	if err != nil {
		return nil, fmt.Errorf("find out how images can be mounted: %w", err)
	}
	for _, p := range paths {
		resp.Paths = append(resp.Paths, string(p))
	}
	return resp, nil
}
