package virtiofsd

import (
	"context"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/virtiofs/hostimages"
)

// host shows the images that tatami-host grants, until the result is called. Those
// with the given names are there when it returns, if that does not take long: a guest
// may know them from a child before this one.
func (c *child) host(ctx context.Context, descriptors int64, names []string) (stop func()) {
	h := hostimages.New(hostimages.Config{Directory: c.dir, Dial: c.dial, Descriptors: descriptors, Node: c.node, Log: c.log})
	c.hosted.Store(h)
	ctx, cancel := context.WithCancel(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		h.Run(ctx)
	}()
	var finding sync.WaitGroup
	for _, name := range names {
		finding.Go(func() { h.Find(name) })
	}
	finding.Wait()
	if len(names) > 0 {
		go findAgain(ctx, h, names)
	}
	return func() {
		cancel()
		<-done
		c.log.Info("images of tatami-host", "asked", h.Stats())
	}
}

// findAgain looks for images for as long as tatami-host may be away, as when it is
// upgraded. What is there already costs nothing.
func findAgain(ctx context.Context, h *hostimages.Client, names []string) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		select {
		case <-time.After(time.Second):
		case <-ctx.Done():
			return
		}
		for _, name := range names {
			h.Find(name)
		}
	}
}

// node asks for the node id of an image's name.
func (c *child) node(name string) uint64 {
	var node uint64
	if _, err := c.parent.Call(context.Background(), opNode, fileArgs{name}, &node); err != nil {
		c.log.Warn("node id of image", "image", name, "err", err)
	}
	return node
}

// hosted are the images of tatami-host that children have shown, by their names, which
// say what is in them: so each has one node id for ever.
type hosted struct {
	mu    sync.Mutex
	nodes map[string]uint64
	last  uint64
	over  bool // there were more than maxHosted
}

const (
	// maxHosted is how many a child after this one can be told of.
	maxHosted = 256
	// firstHosted is above the ids of files in the shared directory.
	firstHosted = 1 << 40
)

// node returns the id of a name.
func (h *hosted) node(name string) (uint64, error) {
	if _, err := sharedimages.Parse(name); err != nil {
		return 0, err
	}
	h.mu.Lock()
	defer h.mu.Unlock()
	if n, ok := h.nodes[name]; ok {
		return n, nil
	}
	h.last++
	if h.over = len(h.nodes) == maxHosted; h.over {
		return firstHosted + h.last, nil
	}
	if h.nodes == nil {
		h.nodes = map[string]uint64{}
	}
	h.nodes[name] = firstHosted + h.last
	return h.nodes[name], nil
}

// names are those that a child can be told of; false when that is not all.
func (h *hosted) names() ([]string, bool) {
	h.mu.Lock()
	defer h.mu.Unlock()
	return slices.Sorted(maps.Keys(h.nodes)), !h.over
}
