package sched

import (
	"cmp"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"sync/atomic"
	"time"
	"weak"

	"github.com/containerd/errdefs"
)

// Class is a class of workload, and its part of everything that is scheduled.
type Class struct {
	Name string
	// Share is the class's weight among those that want something at the same time.
	Share int
	// Floor is what the class gets of the link whatever others want, Ceiling what it
	// gets at most even when nobody else wants it; zero values are none. While nobody
	// has said what the link can do, per cent are of what each host can.
	Floor, Ceiling Rate
	// Fill says that the rest of an image is fetched when its container has started.
	Fill bool
}

// Rate is a part of the link: bytes a second, or per cent of it when Percent is set.
type Rate struct {
	Bytes   int64
	Percent float64
}

// defaultClasses are those of a node where nobody says otherwise.
func defaultClasses() []Class {
	return []Class{{Name: "online", Share: 95, Fill: true}, {Name: "batch", Share: 5}}
}

// Config of a Scheduler.
type Config struct {
	Classes []Class // by importance, the most important first; none: online and batch
	Default string  // class of work that has none; "": the first
	Link    int64   // bytes a second of the node's link; 0: measured
	Off     bool    // everything in the order in which it comes, as if there were no classes
}

// maxClasses bounds what every queue has to look at for every grant.
const maxClasses = 16

func (cfg Config) validate() error {
	if len(cfg.Classes) > maxClasses {
		return fmt.Errorf("%d classes: at most %d are possible: %w", len(cfg.Classes), maxClasses, errdefs.ErrInvalidArgument)
	}
	if cfg.Link < 0 {
		return fmt.Errorf("a link of %d bytes a second: say what it can do, or 0 to have it measured: %w", cfg.Link, errdefs.ErrInvalidArgument)
	}
	names, floors := map[string]bool{}, 0.0
	for _, c := range cfg.Classes {
		if err := c.validate(); err != nil {
			return fmt.Errorf("class %q: %w", c.Name, err)
		}
		if names[c.Name] {
			return fmt.Errorf("class %q is there twice: %w", c.Name, errdefs.ErrInvalidArgument)
		}
		names[c.Name] = true
		floors += c.Floor.Percent
		if cfg.Link > 0 {
			floors += float64(c.Floor.Bytes) / float64(cfg.Link) * 100
		}
	}
	if floors > 100*maxFloors {
		return fmt.Errorf("the floors of all classes are %.0f%% of the link: at most %.0f%% can be promised: %w", floors, 100*maxFloors, errdefs.ErrInvalidArgument)
	}
	if !names[cfg.Default] {
		return fmt.Errorf("default class %q is none of the classes: %w", cfg.Default, errdefs.ErrInvalidArgument)
	}
	return nil
}

func (c Class) validate() error {
	switch {
	case c.Name == "":
		return fmt.Errorf("a class needs a name: %w", errdefs.ErrInvalidArgument)
	case c.Share < 1 || c.Share > 1e6:
		return fmt.Errorf("share %d: it has to be 1 to 1000000: %w", c.Share, errdefs.ErrInvalidArgument)
	case !c.Floor.valid() || !c.Ceiling.valid():
		return fmt.Errorf("floor and ceiling have to be bytes a second, or 0 to 100 per cent of the link: %w", errdefs.ErrInvalidArgument)
	case c.Ceiling != (Rate{}) && (c.Ceiling.Bytes > 0) == (c.Floor.Bytes > 0) &&
		(c.Floor.Bytes > c.Ceiling.Bytes || c.Floor.Percent > c.Ceiling.Percent):
		return fmt.Errorf("the floor is above the ceiling: %w", errdefs.ErrInvalidArgument)
	}
	return nil
}

// valid also refuses NaN.
func (r Rate) valid() bool {
	return r.Bytes >= 0 && r.Percent >= 0 && r.Percent <= 100 && (r.Bytes == 0 || r.Percent == 0)
}

// Scheduler has the queues of a node. A nil Scheduler, and the nil queues that it
// gives, let everything pass at once.
type Scheduler struct {
	cfg              Config
	classes          []*Class // by importance
	orphan           *Flow    // of work that has no flow
	began            time.Time
	link             *rateQueue
	cpu, disk, relay *Slots
	read             atomic.Int64 // bytes of all hosts

	mu    sync.Mutex
	hosts map[string]*Upstream           // protected by mu
	other *Upstream                      // of hosts beyond maxHosts; protected by mu
	flows map[flowKey]weak.Pointer[Flow] // protected by mu
	own   []weak.Pointer[Slots]          // of Turns; protected by mu
}

type flowKey struct{ class, id string }

// diskTurns writes at a time keep a disk busy.
const diskTurns = 8

// New returns a Scheduler. The error is of class ErrInvalidArgument.
func New(cfg Config) (*Scheduler, error) {
	cfg.Classes = slices.Clone(cfg.Classes)
	if len(cfg.Classes) == 0 {
		cfg.Classes = defaultClasses()
	}
	cfg.Default = cmp.Or(cfg.Default, cfg.Classes[0].Name)
	if err := cfg.validate(); err != nil {
		return nil, err
	}
	s := &Scheduler{cfg: cfg, began: time.Now(), hosts: map[string]*Upstream{}, flows: map[flowKey]weak.Pointer[Flow]{}}
	for i := range cfg.Classes {
		s.classes = append(s.classes, &cfg.Classes[i])
	}
	order := s.order(cfg.Default)
	s.orphan = &Flow{class: s.classes[order], order: order}
	s.link = newRateQueue("link", s)
	s.link.est = estimate{seen: cfg.Link == 0, fixed: cfg.Link > 0, capacity: float64(cfg.Link)}
	s.link.pace.bytes, s.link.pace.percent, s.link.pace.open = true, cfg.Link > 0, cfg.Link == 0
	s.link.pace.bounds(0)
	s.link.wires.passive = true // the hosts' queues bound them
	procs := runtime.GOMAXPROCS(0)
	s.cpu = newShortSlots("cpu", procs, s)
	s.disk = newShortSlots("disk", diskTurns, s)
	s.relay = newShortSlots("relay", 2*procs+2, s)
	return s, nil
}

// Enabled says whether anything but the order in which work comes counts.
func (s *Scheduler) Enabled() bool { return s != nil && !s.cfg.Off }

// now is the time of the scheduler's queues.
func (s *Scheduler) now() time.Duration { return time.Since(s.began) }

func (s *Scheduler) order(class string) int {
	return slices.IndexFunc(s.classes, func(c *Class) bool { return c.Name == class })
}

// Flow returns the flow of a sandbox, always the same one while somebody uses it.
// A class that there is not counts as the default class.
func (s *Scheduler) Flow(class, id string) *Flow {
	if s == nil {
		return &Flow{id: id}
	}
	order := s.order(class)
	if order < 0 {
		order = s.orphan.order
	}
	key := flowKey{s.classes[order].Name, id}
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.flows[key].Value(); f != nil {
		return f
	}
	f := &Flow{class: s.classes[order], order: order, id: id}
	s.flows[key] = weak.Make(f)
	runtime.AddCleanup(f, s.forgetFlow, key)
	return f
}

// forgetFlow is called when nobody uses a flow of this name any more.
func (s *Scheduler) forgetFlow(key flowKey) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if p, ok := s.flows[key]; ok && p.Value() == nil {
		delete(s.flows, key)
	}
}

// Upstream has the queues before one host that is downloaded from. A slow host keeps
// nobody waiting who wants something of another. A host that nobody asks for is
// forgotten: ask for each request.
func (s *Scheduler) Upstream(host string) *Upstream {
	if s == nil {
		return nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	u := s.hosts[host]
	if u == nil {
		u = s.addHost(host)
	}
	u.used = s.now()
	return u
}

// addHost adds a host, if there is room or one that is idle. Precondition: mu is held.
func (s *Scheduler) addHost(host string) *Upstream {
	if len(s.hosts) >= maxHosts && !s.dropIdle() {
		if s.other == nil {
			s.other = newUpstream("other hosts", s)
		}
		return s.other
	}
	u := newUpstream(host, s)
	s.hosts[host] = u
	return u
}

// dropIdle forgets the host that nobody has used for the longest time, if there is one
// that is idle. Precondition: mu is held.
func (s *Scheduler) dropIdle() bool {
	oldest := ""
	for name, u := range s.hosts {
		if u.idle() && (oldest == "" || u.used < s.hosts[oldest].used) {
			oldest = name
		}
	}
	delete(s.hosts, oldest)
	return oldest != ""
}

// upstreams are the hosts that are known, by name; those that nobody uses are forgotten.
func (s *Scheduler) upstreams() []*Upstream {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*Upstream
	for name, u := range s.hosts {
		if s.now()-u.used > hostIdle && u.idle() {
			delete(s.hosts, name)
			continue
		}
		all = append(all, u)
	}
	if s.other != nil {
		all = append(all, s.other)
	}
	slices.SortFunc(all, func(a, b *Upstream) int { return cmp.Compare(a.rate.name, b.rate.name) })
	return all
}

// CPU is what computing waits for: unpacking, verifying, building indexes.
func (s *Scheduler) CPU() *Slots {
	if s == nil {
		return nil
	}
	return s.cpu
}

// Disk is what writing to the store waits for.
func (s *Scheduler) Disk() *Slots {
	if s == nil {
		return nil
	}
	return s.disk
}

// Turns returns Slots of the caller's own: n turns, each of which may take long. When
// there are several, a quarter of them are only for the most important class,
// and not for its background work.
func (s *Scheduler) Turns(name string, n int) *Slots {
	if s == nil {
		return nil
	}
	own := newSlots(name, n, s)
	own.turns.reserve = n / 4
	s.mu.Lock()
	defer s.mu.Unlock()
	s.own = slices.DeleteFunc(s.own, func(p weak.Pointer[Slots]) bool { return p.Value() == nil })
	s.own = append(s.own, weak.Make(own))
	return own
}

// turns are those of Turns that somebody still has.
func (s *Scheduler) turns() (all []*Slots) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, p := range s.own {
		if own := p.Value(); own != nil {
			all = append(all, own)
		}
	}
	return all
}

// Relay is what sending to sandboxes waits for.
func (s *Scheduler) Relay() *Slots {
	if s == nil {
		return nil
	}
	return s.relay
}
