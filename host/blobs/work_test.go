package blobs

import (
	"context"
	"io"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/rootfs/sched"
)

// held is an origin that gives nothing until it is let go, and tells of the work of
// downloads.
type held struct {
	Origin
	works chan *sched.Work
	let   chan struct{}
}

func (h held) Open(ctx context.Context, desc ocispec.Descriptor) (io.ReadCloser, error) {
	h.works <- sched.From(ctx)
	<-h.let
	return h.Origin.Open(ctx, desc)
}

func (h held) Range(ctx context.Context, d digest.Digest, off, n int64) (io.ReadCloser, error) {
	h.works <- sched.From(ctx)
	<-h.let
	return h.Origin.Range(ctx, d, off, n)
}

// A download is as urgent as the most important of its readers, while that one reads.
func TestWorkOfDownload(t *testing.T) {
	turns, err := sched.New(sched.Config{})
	if err != nil {
		t.Fatal(err)
	}
	g := newRig(t, 1<<30)
	g.cfg.Disk = turns.Disk()
	desc, data := g.push(1, 5<<20)
	from := held{g.repo(t), make(chan *sched.Work, 1), make(chan struct{})}
	batch := sched.Standing{Flow: turns.Flow("batch", "job"), Rank: sched.Prefetch}
	online := sched.Standing{Flow: turns.Flow("online", "pod")}
	open := func(s sched.Standing) io.ReadCloser {
		r, err := g.Open(sched.With(t.Context(), sched.NewWork(s)), from, desc, 0, desc.Size)
		if err != nil {
			t.Fatal(err)
		}
		return r
	}
	job := open(batch)
	defer job.Close()
	w := <-from.works
	if got := w.Standing(); got != batch {
		t.Errorf("%s of class %q", got.Rank, got.Flow.Class().Name)
	}
	pod := open(online)
	if got := w.Standing(); got != online {
		t.Errorf("with an online reader: %s of class %q", got.Rank, got.Flow.Class().Name)
	}
	pod.Close()
	if got := w.Standing(); got != batch {
		t.Errorf("without it: %s of class %q", got.Rank, got.Flow.Class().Name)
	}
	close(from.let)
	if got, err := io.ReadAll(job); err != nil || string(got) != string(data) {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	for _, q := range turns.Status().Queues {
		if q.Name == "disk" && q.Classes[1].Total <= 0 {
			t.Error("the disk has no turns of the batch job")
		}
	}
}
