// Package relay is the registry that one sandbox sees: the read side of the
// OCI distribution API over the images that were granted to it, with one
// extension, ranges of a segment:
//
//	GET|HEAD /v2/
//	GET|HEAD /v2/<name>/manifests/<digest or tag>
//	GET|HEAD /v2/<name>/blobs/<digest>             Range
//	GET|HEAD /v2/<name>/referrers/<digest>         ?artifactType=
//	GET|HEAD /v2/<name>/segments/<segment id>      Range; plain bytes
//
// As with containerd's mirrors, ?ns=<domain> tells repositories of the same
// name at several registries apart.
//
// How urgent a request is, the guest says with a Priority header (RFC 9218): with
// u=4 and 5 it is for what will be needed soon, with 6 and 7 for what nobody has asked
// for. That can only put it behind other requests of the same sandbox; for whom the
// sandbox is, and what it may take of the node, is known to the host alone (Grant.Flow).
//
// The guest is assumed hostile: it reads what was granted and nothing else, and
// what it can hold of the node is bounded (package ociserve).
package relay

import (
	"context"
	"io"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/tatami-containers/tatami/host/ociserve"
	"github.com/tatami-containers/tatami/rootfs/sched"
)

// Image is what the relay serves of one image. A kind is the path element that
// leads to an object: "manifests", "blobs" or "segments".
type Image interface {
	// Find describes an object: media type and size in bytes.
	Find(kind string, d digest.Digest) (ocispec.Descriptor, bool)
	// Open returns the bytes [off, off+n) of an object that Find knows. It is
	// of class Unavailable when another source may do better.
	Open(ctx context.Context, kind string, d digest.Digest, off, n int64) (io.ReadCloser, error)
	// Referrers describes the artifacts whose subject the image is.
	Referrers() []ocispec.Descriptor
}

// Grant lets a sandbox read one image.
type Grant struct {
	Domain     string // "docker.io", as a mirror is asked for it: ?ns=
	Repository string // as it appears in the path: "library/debian"
	Tag        string // may be empty
	Manifest   digest.Digest
	Image      Image
	Flow       *sched.Flow // for whom it is read
}

// Config of a Relay.
type Config struct {
	// Grants returns what the sandbox may read at the moment.
	Grants func() []Grant
	// Requests bounds those served at a time, others wait; 16 when 0.
	Requests int
	// Stall is how long the guest may take nothing of an answer; 30 s when 0.
	Stall time.Duration
	// Sent counts body bytes, if it is there.
	Sent *atomic.Int64
	// Queue is what is waited for before bytes are sent; nil lets them pass.
	Queue *sched.Slots
	Log   *slog.Logger
}

// Relay serves one sandbox.
type Relay struct {
	*ociserve.Server
	grants func() []Grant
}

// New returns a Relay. It serves nothing until Serve is called.
func New(cfg Config) *Relay {
	r := &Relay{grants: cfg.Grants}
	r.Server = ociserve.New(ociserve.Config{
		Answer: r.answer, Requests: cfg.Requests, Stall: cfg.Stall, Sent: cfg.Sent, Queue: cfg.Queue, Log: cfg.Log,
	})
	return r
}
