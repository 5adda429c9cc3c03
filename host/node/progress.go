package node

import (
	"sync/atomic"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/image"
)

// Progress says how far a Prepare is.
type Progress struct {
	// Phase is "resolve", "index" or "ready"; empty for a reference that is
	// neither being prepared nor was.
	Phase string
	// Done of Total bytes of the layer blobs that have to be fetched.
	Done, Total int64
}

// job is a Prepare under way. Its fields are protected by Node.mu.
type job struct {
	prepares int // of the reference, for several platforms
	manifest digest.Digest
}

// progress is how far the layers of an image are.
type progress struct {
	n        *Node
	manifest digest.Digest
	total    int64                           // bytes of the layers being fetched; protected by Node.mu
	layers   map[digest.Digest]*atomic.Int64 // protected by Node.mu
}

// startJob notes that ref is being prepared; the result ends that.
func (n *Node) startJob(ref string) (end func()) {
	n.mu.Lock()
	defer n.mu.Unlock()
	j := n.jobs[ref]
	if j == nil {
		j = new(job)
		n.jobs[ref] = j
	}
	j.prepares++
	return func() {
		n.mu.Lock()
		defer n.mu.Unlock()
		if j.prepares--; j.prepares == 0 {
			delete(n.jobs, ref)
		}
	}
}

// setJob notes what ref turned out to be.
func (n *Node) setJob(ref string, manifest digest.Digest) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.jobs[ref].manifest = manifest
}

// startProgress begins to count what has to be fetched of img.
func (n *Node) startProgress(img *image.Image) *progress {
	p := &progress{n: n, manifest: img.Desc.Digest, layers: map[digest.Digest]*atomic.Int64{}}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.fetching[p.manifest] = p
	return p
}

func (p *progress) end() {
	p.n.mu.Lock()
	defer p.n.mu.Unlock()
	delete(p.n.fetching, p.manifest)
}

// watch adds the counter of a layer that is fetched whole.
func (p *progress) watch(layer ocispec.Descriptor, bytes *atomic.Int64) {
	p.n.mu.Lock()
	defer p.n.mu.Unlock()
	if p.layers[layer.Digest] == nil {
		p.total += layer.Size
	}
	p.layers[layer.Digest] = bytes
}

// Progress tells how far the preparing of ref is; it waits for nothing.
func (n *Node) Progress(ref string) (Progress, error) {
	named, _, err := parseTarget(ref, "")
	if err != nil {
		return Progress{}, err
	}
	if p, ok := n.underWay(named.String()); ok {
		return p, nil
	}
	m := n.meant(target{reference: named.String()})
	if m == nil {
		return Progress{}, nil
	}
	r, ok := n.known(m.Manifest)
	if !ok {
		return Progress{}, nil
	}
	size := r.compressedSize()
	return Progress{Phase: "ready", Done: size, Total: size}, nil
}

func (n *Node) underWay(ref string) (Progress, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	j, ok := n.jobs[ref]
	switch {
	case !ok:
		return Progress{}, false
	case j.manifest == "":
		return Progress{Phase: "resolve"}, true
	}
	out := Progress{Phase: "index"}
	if p := n.fetching[j.manifest]; p != nil {
		out.Total = p.total
		for _, bytes := range p.layers {
			out.Done += bytes.Load()
		}
		out.Done = min(out.Done, out.Total)
	}
	return out, true
}
