package service

import (
	"context"
	"sync"
	"time"

	"github.com/tatami-containers/tatami/host/kata"
	"github.com/tatami-containers/tatami/protocols/vsock"
)

// Discovery says how sandboxes are found by themselves.
type Discovery struct {
	// RunDirs are where Kata's shims are found.
	RunDirs []string
	// HostPort and RelayPort are where guests expect the two services.
	HostPort, RelayPort uint32
	// ContainerdState is containerd's state directory.
	ContainerdState string
	// Containers says what containers run; what their bundles say counts alone
	// when nil.
	Containers Containers
	// Pods says what pods they are of; nil like Containers.
	Pods Pods
}

// How often it is looked for containers that are gone, and how long sandboxes
// that were there before this process may take to be found again.
const (
	sweepEvery   = 10 * time.Second
	returnWithin = 5 * time.Minute
)

// findWithin bounds how long a connection waits for its sandbox to be found.
const findWithin = 3 * time.Second

func (s *Service) discover(d Discovery) {
	s.bundles = kata.NewBundles(d.ContainerdState)
	s.watcher = kata.NewWatcher(kata.Config{RunDirs: d.RunDirs, Log: s.log})
	s.ports.find = s.findCID
}

// keepPorts opens the ports that all machines of AF_VSOCK share.
func (s *Service) keepPorts() {
	for _, port := range []uint32{s.cfg.Discovery.HostPort, s.cfg.Discovery.RelayPort} {
		if err := s.ports.keep(kata.Identity{}.Address(port)); err != nil {
			s.log.Warn("guests behind AF_VSOCK are served only after their sandbox was found", "error", err)
		}
	}
}

// Discover attaches sandboxes as they come and detaches them as they go, until
// ctx ends. Those that are there then stay attached.
// Precondition: Config.Discovery is there.
func (s *Service) Discover(ctx context.Context) {
	var wg sync.WaitGroup
	wg.Go(func() { s.watcher.Run(ctx, finder{s}) })
	wg.Go(func() { s.sweepUntil(ctx) })
	wg.Wait()
}

// findCID looks for sandboxes because of a context ID that is nobody's.
func (s *Service) findCID(cid uint32) bool {
	if cid <= vsock.HostCID || s.misses.recent(cid) {
		return false
	}
	ctx, cancel := context.WithTimeout(s.ctx, findWithin)
	defer cancel()
	err := s.watcher.Rescan(ctx)
	if s.serves(cid) {
		return true // however many shims do not answer
	}
	if err != nil {
		return false
	}
	s.misses.add(cid)
	s.log.Debug("a connection is from no known sandbox", "cid", cid)
	return false
}

// serves says whether a sandbox has the context ID.
func (s *Service) serves(cid uint32) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, box := range s.sandboxes {
		if box != nil && box.at.cid == cid {
			return true
		}
	}
	return false
}

func (s *Service) sweepUntil(ctx context.Context) {
	tick := time.NewTicker(sweepEvery)
	defer tick.Stop()
	expire := time.NewTimer(returnWithin)
	defer expire.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
			s.sweep()
		case <-expire.C:
			s.expire()
		}
	}
}

// sweep gives back what containers held that are gone.
func (s *Service) sweep() {
	for _, box := range s.found() {
		box.dropGone()
	}
}

// found returns the sandboxes that were not attached by hand.
func (s *Service) found() []*sandbox {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []*sandbox
	for _, box := range s.sandboxes {
		if box != nil && box.at.found {
			out = append(out, box)
		}
	}
	return out
}

// expire forgets sandboxes that were not found again.
func (s *Service) expire() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, n := range s.notes.list() {
		if _, ok := s.sandboxes[n.ID]; !ok && n.Found {
			s.notes.drop(n.ID)
		}
	}
}

// finder attaches and detaches what a Watcher finds.
type finder struct{ s *Service }

var _ kata.Handler = finder{}

// Added implements kata.Handler. A sandbox that is attached by hand stays so.
func (f finder) Added(k kata.Sandbox) error {
	if box, err := f.s.find(k.ID); err == nil && !box.at.found {
		return nil
	}
	d := f.s.cfg.Discovery
	return f.s.attach(k.ID, place{host: k.Address(d.HostPort), relay: k.Address(d.RelayPort), cid: k.CID, found: true})
}

// Removed implements kata.Handler. What the sandbox still reads is broken off.
func (f finder) Removed(id string) {
	box, err := f.s.find(id)
	if err != nil || !box.at.found {
		return // attached by hand, or detached so
	}
	over, cancel := context.WithCancel(context.Background())
	cancel()
	_ = f.s.detach(over, id) // not attached is fine
}

// How long a context ID that was nobody's is refused without looking, and how
// many are remembered.
const (
	missTime  = time.Second
	maxMisses = 1024
)

// misses remembers the context IDs that were nobody's lately: machines that
// are none of ours must not keep the node looking.
type misses struct {
	mu sync.Mutex
	at map[uint32]time.Time // protected by mu
}

func (m *misses) recent(cid uint32) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	at, ok := m.at[cid]
	return ok && time.Since(at) < missTime
}

func (m *misses) add(cid uint32) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.at == nil || len(m.at) >= maxMisses {
		m.at = map[uint32]time.Time{}
	}
	m.at[cid] = time.Now()
}

// runDiscovery runs Discover until the result is called. When it returns, guests
// can connect.
func (s *Service) runDiscovery(ctx context.Context) (stop func()) {
	s.keepPorts()
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		s.Discover(ctx)
	}()
	return func() {
		cancel()
		<-done
	}
}
