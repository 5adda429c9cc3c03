package node

import (
	"context"
	"sync"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

const (
	// buildsOfAll is how many layers are built at a time for the whole node, in times
	// of those of one registry.
	buildsOfAll = 4
	// maxFirst is how many registries have a layer built that does not count.
	maxFirst = 32
)

// builds says who may build a layer next. Each takes the buffers of a stream, and as
// long as the registry lets it. So each registry has a queue of its own, and besides
// there is one for all; a layer that is the only one of its registry does not wait
// there, however many others slow registries hold up.
type builds struct {
	sched *sched.Scheduler
	each  int // layers of one registry at a time
	all   *sched.Slots

	mu    sync.Mutex
	from  map[string]*builder // by registry, "" for the node itself; protected by mu
	first int                 // builds that do not count; protected by mu
}

// builder is one registry while somebody builds or wants to.
type builder struct {
	turns   *sched.Slots
	users   int // protected by builds.mu
	running int // protected by builds.mu
}

func newBuilds(s *sched.Scheduler, each int) *builds {
	return &builds{sched: s, each: each, all: s.Turns("layers", buildsOfAll*each), from: map[string]*builder{}}
}

// enter waits until ctx's work may build a layer of a registry; leave ends that. The
// error is that of ctx.
func (b *builds) enter(ctx context.Context, registry string) (leave func(), err error) {
	one := b.join(registry)
	end, err := one.turns.Enter(ctx)
	if err != nil {
		b.part(registry, one)
		return nil, err
	}
	first := b.start(one)
	done := func() {}
	if !first {
		done, err = b.all.Enter(ctx)
	}
	leave = func() {
		done()
		b.stop(one, first)
		end()
		b.part(registry, one)
	}
	if err != nil {
		leave()
		return nil, err
	}
	return leave, nil
}

// join counts one who wants to build.
func (b *builds) join(registry string) *builder {
	b.mu.Lock()
	defer b.mu.Unlock()
	one := b.from[registry]
	if one == nil {
		one = &builder{turns: b.sched.Turns("layers "+registry, b.each)}
		b.from[registry] = one
	}
	one.users++
	return one
}

// part ends join. A registry that nobody builds from is forgotten.
func (b *builds) part(registry string, one *builder) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if one.users--; one.users == 0 {
		delete(b.from, registry)
	}
}

// start counts a build, and tells whether it is the first of its registry.
func (b *builds) start(one *builder) (first bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	one.running++
	if one.running > 1 || b.first == maxFirst {
		return false
	}
	b.first++
	return true
}

// stop ends start.
func (b *builds) stop(one *builder, first bool) {
	b.mu.Lock()
	defer b.mu.Unlock()
	one.running--
	if first {
		b.first--
	}
}
