package node

import (
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/rootfs/index"
)

// maxTouches bounds what is recorded of one start on the node.
const maxTouches = 8192

// recording is a start of which the node itself sees what it reads.
type recording struct {
	ended chan struct{} // closed when it is over before its time
	once  sync.Once
}

func (r *recording) end() { r.once.Do(func() { close(r.ended) }) }

// Record records what is read through the lease, until the time that the settings give
// a start is over, EndRecordings is called, or the lease ends. RecordStart says what
// the arguments are. It is done once for a lease: a device may open an image as often as
// it likes, and a container starts once.
func (l *Lease) Record(args []string, partial bool) {
	if l.n.cfg.Profiles.Record == 0 || l.recorded.Swap(true) {
		return
	}
	r := &recording{ended: make(chan struct{})}
	l.n.noteRecording(l.Manifest(), r)
	touched := l.open.Record(maxTouches)
	l.n.background.Go(func() {
		whole := l.waitStart(r)
		l.n.dropRecording(l.Manifest(), r)
		var ranges []index.Range
		for _, t := range touched.Stop() {
			ranges = append(ranges, t.Range)
		}
		if err := l.RecordStart(args, ranges, partial || !whole); err != nil && !errdefs.IsNotFound(err) { // it is gone
			l.n.log.Warn("a start is not recorded", "manifest", l.Manifest(), "error", err)
		}
	})
}

// waitStart waits for the end of a recording, and says whether that is when it should
// be.
func (l *Lease) waitStart(r *recording) bool {
	select {
	case <-r.ended:
	case <-l.ended:
	case <-time.After(l.n.cfg.Profiles.Record):
	case <-l.n.ctx.Done():
		return false
	}
	return true
}

// Begin says that a container begins to use the file, and whether the rest of it shall
// follow. What the first one reads is recorded, as Lease.Record does: what is mounted
// has a page cache, in which others read what the first has read.
func (f *File) Begin(fill bool) {
	if f.image != f.lease.open {
		return // layers of another image
	}
	f.lease.Record(nil, false)
	if fill {
		f.lease.FillAfterStart()
	}
}

// EndRecordings ends what the node records of an image: its containers are ready.
func (n *Node) EndRecordings(manifest digest.Digest) {
	n.mu.Lock()
	defer n.mu.Unlock()
	for r := range n.recordings[manifest] {
		r.end()
	}
}

func (n *Node) noteRecording(manifest digest.Digest, r *recording) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.recordings[manifest] == nil {
		n.recordings[manifest] = map[*recording]bool{}
	}
	n.recordings[manifest][r] = true
}

func (n *Node) dropRecording(manifest digest.Digest, r *recording) {
	n.mu.Lock()
	defer n.mu.Unlock()
	delete(n.recordings[manifest], r)
	if len(n.recordings[manifest]) == 0 {
		delete(n.recordings, manifest)
	}
}
