package virtiofs

import (
	"encoding/binary"
	"fmt"
	"io"
	"log"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/containerd/errdefs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
)

const (
	defaultQueues   = 16
	maxQueues       = 255 // and the high-priority one
	defaultRequests = 256
	defaultReplies  = 16 << 20

	tagLen = 36 // bytes of the tag in the configuration space
)

// Config of a device. Zero values mean the defaults.
type Config struct {
	// Directory is shown at the root of a device of images only. Or
	Directory *Directory
	// Tree is shown.
	Tree *Tree
	// Queues is how many request queues a VMM may use, beside the high-priority
	// one; 16. What it does not use costs nothing.
	Queues int
	// Tag is the file system's name for guests, at most 36 bytes. QEMU and Cloud
	// Hypervisor give guests their own and need none here.
	Tag string
	// XAttr lets guests ask for extended attributes, of Files that have some; without,
	// they ask once. Linux then asks for security.capability before each write, unless
	// KillPriv is set.
	XAttr bool
	// KillPriv has the node, not the guest, clear set-user-ID bits of files that are
	// written. A guest that keeps attributes sees them longer.
	KillPriv bool
	// Requests is how many reads of images may wait for their data at a time, 256;
	// then the queues wait.
	Requests int
	// ReplyBytes bounds the memory of reads that pass through this process, 16 MiB.
	ReplyBytes int64
	// Began is told the INIT of a session, before the guest has its answer, and
	// Session is the one with which a process before this one worked, whose requests
	// this one takes up; each may be nil.
	Began   func(init []byte)
	Session []byte
	// Broken is told that a guest broke a ring, see vhostuser.Config; may be nil.
	Broken func(error)
	Log    *slog.Logger // nil for none
}

func (c *Config) complete() error {
	if c.Queues == 0 {
		c.Queues = defaultQueues
	}
	if c.Requests == 0 {
		c.Requests = defaultRequests
	}
	if c.ReplyBytes == 0 {
		c.ReplyBytes = defaultReplies
	}
	if c.Log == nil {
		c.Log = slog.New(slog.DiscardHandler)
	}
	if (c.Directory == nil) == (c.Tree == nil) {
		return fmt.Errorf("make virtio-fs device: %w: either a directory or a tree is needed", errdefs.ErrInvalidArgument)
	}
	if c.Queues < 1 || c.Queues > maxQueues || len(c.Tag) > tagLen || c.Requests < 1 || c.ReplyBytes < maxRead {
		return fmt.Errorf("make virtio-fs device: %w: %d queues (1 to %d), tag of %d bytes (at most %d), %d requests, %d bytes for replies (at least %d)",
			errdefs.ErrInvalidArgument, c.Queues, maxQueues, len(c.Tag), tagLen, c.Requests, c.ReplyBytes, maxRead)
	}
	return nil
}

// space is struct virtio_fs_config: the tag, padded with zeros, and the number of
// request queues.
func (c *Config) space() []byte {
	if c.Tag == "" {
		return nil
	}
	b := make([]byte, tagLen, tagLen+4)
	copy(b, c.Tag)
	return binary.LittleEndian.AppendUint32(b, uint32(c.Queues))
}

// Stats counts since the device was made.
type Stats struct {
	Sessions  int64 // INITs of guests
	Reads     int64 // answered with data
	ReadBytes int64
	Direct    int64 // Reads out of the page cache, without a wait
	Failures  int64 // reads answered with an error
	// Writes and WriteBytes are those of passthrough files.
	Writes, WriteBytes int64
}

// device is the vhostuser.Device.
type device struct {
	cfg     Config
	tree    *Tree
	mixed   bool // there may be more than images
	log     *slog.Logger
	fs      *dispatcher
	session atomic.Pointer[fuse.ProtocolServer] // of the last INIT
	slots   chan struct{}                       // one for each read of images that waits
	pending chan struct{}                       // one for each request of Files
	buffers *buffers
	// fileBuffers are for requests of Files, which must not wait for images.
	fileBuffers *buffers
	calls       sync.Pool // *call

	sessions, reads, readBytes, direct, failures, writes, writeBytes atomic.Int64
}

func newDevice(cfg Config) (*device, error) {
	tree := cfg.Tree
	if tree == nil {
		tree = NewTree()
		if err := tree.Mount("/", cfg.Directory); err != nil {
			return nil, err
		}
	}
	return &device{
		cfg: cfg, tree: tree, mixed: cfg.Tree != nil, log: cfg.Log,
		fs:      newDispatcher(tree),
		slots:   make(chan struct{}, cfg.Requests),
		pending: make(chan struct{}, maxPending),
		buffers: newBuffers(cfg.ReplyBytes), fileBuffers: newBuffers(fileBytes),
		calls: sync.Pool{New: func() any { return &call{} }},
	}, nil
}

// resume goes on with the session of a process before this one.
func (d *device) resume(init []byte) error {
	if init == nil {
		return nil
	}
	s := d.newSession()
	if _, st := s.HandleRequest([][]byte{init}, [][]byte{make([]byte, maxRequest)}); !st.Ok() {
		return fmt.Errorf("resume session: %w: %s", errdefs.ErrInvalidArgument, st)
	}
	d.session.Store(s)
	return nil
}

func (d *device) stats() Stats {
	return Stats{Sessions: d.sessions.Load(), Reads: d.reads.Load(), ReadBytes: d.readBytes.Load(),
		Direct: d.direct.Load(), Failures: d.failures.Load(),
		Writes: d.writes.Load(), WriteBytes: d.writeBytes.Load()}
}

// Stopped implements vhostuser.Device. There is nothing to forget: a driver that
// starts anew sends INIT, one whose machine was paused goes on.
func (d *device) Stopped(int) {}

// newSession is the protocol server that answers an INIT. One for each: it keeps
// what it negotiated, and is not made to negotiate twice.
func (d *device) newSession() *fuse.ProtocolServer {
	o := &fuse.MountOptions{
		MaxWrite: maxRead, MaxBackground: 128, DisableXAttrs: !d.cfg.XAttr, DisableReadDirPlus: !d.mixed,
		// With CAP_PASSTHROUGH, Linux refuses to mount EROFS from a file of this
		// file system (s_stack_depth, fs/erofs/super.c).
		DisabledCapabilities: fuse.CAP_PASSTHROUGH, ExtraCapabilities: fuse.CAP_ASYNC_DIO,
		Logger: log.New(io.Discard, "", 0), // a guest could fill the log
	}
	if d.mixed {
		o.ExtraCapabilities |= filesCapabilities
	}
	if d.mixed && d.cfg.KillPriv {
		o.ExtraCapabilities |= killPrivCapabilities
	}
	return fuse.NewProtocolServer(d.fs, o)
}

var _ vhostuser.Device = (*device)(nil)
