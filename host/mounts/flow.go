package mounts

import (
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/host/node"
	"github.com/tatami-containers/tatami/host/snapshotter"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// shared is an open image. What it is mounted or exposed for is shared by all holders
// of the image, so it is read for the most important of those that came while it was
// open, until somebody knows better (Mounts.SetFlow).
type shared struct {
	*node.File
	m     *Mounts
	image digest.Digest
	flow  *sched.Flow // protected by Mounts.mu
}

// share makes known an image that was opened for a holder, and raises what is open of
// the same image.
func (m *Mounts) share(f *node.File, c snapshotter.Chain) *shared {
	s := &shared{File: f, m: m, image: imageOf(c), flow: m.cfg.Flow(c)}
	m.mu.Lock()
	defer m.mu.Unlock()
	for other := range m.files {
		if other.image != s.image {
			continue
		}
		if moreImportant(s.flow, other.flow) {
			other.raise(s.flow)
		} else {
			s.flow = other.flow
		}
	}
	m.files[s] = true
	s.raise(s.flow)
	return s
}

func moreImportant(a, b *sched.Flow) bool {
	return sched.Standing{Flow: a}.Before(sched.Standing{Flow: b})
}

// raise says for whom the image is read. Precondition: Mounts.mu is held.
func (s *shared) raise(to *sched.Flow) {
	s.flow = to
	s.SetFlow(to)
}

// SetFlow says for whom what is open of a chain's image is read from now on: it is known
// which containers have it.
func (m *Mounts) SetFlow(c snapshotter.Chain, to *sched.Flow) {
	m.mu.Lock()
	defer m.mu.Unlock()
	for s := range m.files {
		if s.image == imageOf(c) {
			s.raise(to)
		}
	}
}

// Close implements mount.File.
func (s *shared) Close() error {
	s.m.mu.Lock()
	delete(s.m.files, s)
	s.m.mu.Unlock()
	return s.File.Close()
}
