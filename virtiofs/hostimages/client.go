package hostimages

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
	"github.com/tatami-containers/tatami/rootfs/store/shared"
	"github.com/tatami-containers/tatami/virtiofs"
)

// Config of a Client.
type Config struct {
	// Directory gets the images.
	Directory *virtiofs.Directory
	// Dial gives a connection on which hello was said (sharedimages.Dial); it is
	// called whenever there is none, and ends with its context.
	Dial func(context.Context) (*net.UnixConn, error)
	// Patience is how long a read waits for a connection, and how long tatami-host is
	// asked again for what it cannot reach; a minute when 0.
	Patience time.Duration
	// Idle is how long an image that is not granted any more must not have been
	// read before its name vanishes; a minute when 0.
	Idle time.Duration
	// Descriptors is how many may be kept for bootstraps and shared segments; 512
	// when 0. A segment also takes a mapping. What is over is asked for.
	Descriptors int64
	// Node gives the node id of a name, see Directory.AddAs; may be nil.
	Node func(name string) uint64
	Log  *slog.Logger // nil for none
}

// findTime bounds how long a guest waits for a name.
const findTime = 3 * time.Second

// maxFiles bounds the images of one sandbox.
const maxFiles = 1024

// Between attempts to connect, to open an image again, and to read.
const (
	firstRetry = 20 * time.Millisecond
	maxRetry   = time.Second
)

// Stats counts what was asked of tatami-host.
type Stats struct {
	Opens, Shares    int64
	Reads, ReadBytes int64 // with an answer
	Lost             int64 // connections
}

// Client keeps a Directory.
type Client struct {
	cfg     Config
	finding chan struct{} // has one element while a name is looked for

	opens, shares, reads, readBytes, lost atomic.Int64

	used atomic.Int64 // descriptors that are kept

	mu      sync.Mutex
	ended   bool                    // protected by mu
	link    *link                   // nil while there is none; protected by mu
	files   map[digest.Digest]*file // protected by mu
	changed chan struct{}           // closed and replaced when something here changes; protected by mu
	kick    chan struct{}           // has one element when a file may have to be opened again
}

// New returns a Client that does nothing before Run.
func New(cfg Config) *Client {
	if cfg.Patience == 0 {
		cfg.Patience = time.Minute
	}
	if cfg.Idle == 0 {
		cfg.Idle = time.Minute
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	if cfg.Descriptors == 0 {
		cfg.Descriptors = 512
	}
	return &Client{cfg: cfg, finding: make(chan struct{}, 1), files: map[digest.Digest]*file{}, changed: make(chan struct{}), kick: make(chan struct{}, 1)}
}

// full says whether no more descriptors are to be kept.
func (c *Client) full() bool { return c.used.Load() >= c.cfg.Descriptors }

// Stats returns the counters.
func (c *Client) Stats() Stats {
	return Stats{Opens: c.opens.Load(), Shares: c.shares.Load(), Reads: c.reads.Load(), ReadBytes: c.readBytes.Load(), Lost: c.lost.Load()}
}

// Run keeps a connection until ctx ends. Then it removes all its files from the
// Directory.
func (c *Client) Run(ctx context.Context) {
	for ctx.Err() == nil {
		if l := c.connect(ctx); l != nil {
			c.serve(ctx, l)
		}
	}
	c.mu.Lock()
	c.ended = true
	files := c.files
	c.files = map[digest.Digest]*file{}
	c.wake()
	c.mu.Unlock()
	for _, f := range files {
		c.cfg.Directory.Remove(f.name)
		f.close()
	}
}

// connect returns a connection, or nil when ctx ends.
func (c *Client) connect(ctx context.Context) *link {
	for delay, tries := firstRetry, 0; ; delay, tries = min(2*delay, maxRetry), tries+1 {
		l, err := c.dial(ctx)
		if err == nil {
			return l
		}
		if ctx.Err() != nil {
			return nil
		}
		if tries == 0 {
			c.cfg.Log.Warn("no connection to tatami-host; trying on", "err", err)
		}
		sleep(ctx, delay)
	}
}

func (c *Client) dial(ctx context.Context) (*link, error) {
	uc, err := c.cfg.Dial(ctx)
	if err != nil {
		return nil, err
	}
	return newLink(uc)
}

func sleep(ctx context.Context, d time.Duration) {
	select {
	case <-time.After(d):
	case <-ctx.Done():
	}
}

// serve uses a connection until its end.
func (c *Client) serve(ctx context.Context, l *link) {
	c.set(l)
	c.cfg.Log.Info("connected to tatami-host")
	keeping, stopKeeping := context.WithCancel(ctx)
	var keeper sync.WaitGroup
	keeper.Go(func() { c.keep(keeping, l) })
	stop := context.AfterFunc(ctx, l.leave)
	err := l.receive(c.gone)
	stop()
	stopKeeping()
	l.end()
	keeper.Wait()
	c.set(nil)
	if ctx.Err() == nil {
		c.lost.Add(1)
		c.cfg.Log.Warn("the connection to tatami-host is lost; what the node does not have is waited for", "patience", c.cfg.Patience, "err", err)
	}
}

// set notes that there is another connection, or none.
func (c *Client) set(l *link) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, f := range c.files {
		f.gone = false // as far as the next one knows: another container may have it
		if f.link != nil {
			f.link, f.since = nil, time.Now()
		}
	}
	c.link = l
	c.wake()
}

// wake wakes all who wait for a change. Precondition: mu is held.
func (c *Client) wake() {
	close(c.changed)
	c.changed = make(chan struct{})
	select {
	case c.kick <- struct{}{}:
	default:
	}
}

// gone notes that an image is not granted any more.
func (c *Client) gone(manifest digest.Digest) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f := c.files[manifest]; f != nil {
		f.gone, f.seen = true, f.uses.Load()
	}
}

// look says where a file is open; nil when it is not. changed is closed when that
// may be different. The error is of a file that will not be.
func (c *Client) look(f *file) (l *link, handle uint32, changed <-chan struct{}, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case f.link != nil:
		return f.link, f.handle, nil, nil
	case f.err != nil:
		return nil, 0, nil, f.err
	case c.ended || time.Since(f.since) >= c.cfg.Patience:
		return nil, 0, nil, fmt.Errorf("tatami-host is not there, or does not know this image, since %s: see its log on the node: %w", f.since.Format(time.RFC3339), errdefs.ErrUnavailable)
	}
	return nil, 0, c.changed, nil
}

// left is how long a file may still be waited for.
func (c *Client) left(f *file) time.Duration {
	c.mu.Lock()
	defer c.mu.Unlock()
	return max(0, c.cfg.Patience-time.Since(f.since))
}

// closed notes that tatami-host knows the file's handle on l no more, or that l is
// lost.
func (c *Client) closed(f *file, l *link, handle uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.link == l && f.handle == handle {
		f.link, f.since = nil, time.Now()
		c.wake()
	}
}

// open asks for an image.
func (c *Client) open(ctx context.Context, l *link, manifest digest.Digest) (*file, error) {
	c.opens.Add(1)
	a, err := l.do(ctx, sharedimages.Header{Op: sharedimages.Open}, []byte(manifest), nil)
	if err != nil {
		return nil, err
	}
	return newFile(c, manifest, l, a)
}

// share asks for segment k of an image, which has size bytes.
func (c *Client) share(ctx context.Context, l *link, handle uint32, k int, size int64) (*shared.Segment, error) {
	c.shares.Add(1)
	a, err := l.do(ctx, sharedimages.Header{Op: sharedimages.Share, Handle: handle, N: uint32(k)}, nil, nil)
	if err != nil {
		return nil, err
	}
	seg, err := shared.Open(a.files[0], a.files[1], a.Off)
	if err == nil && seg.Size() != size {
		err = errors.Join(fmt.Errorf("a segment of %d bytes came as one of %d: %w", size, seg.Size(), errdefs.ErrDataLoss), seg.Close())
	}
	if err != nil {
		return nil, err
	}
	return seg, nil
}

// Find is for Directory.Find: it asks for the image whose name this is, and says
// whether it is the name of one. It waits for tatami-host, but not for long.
func (c *Client) Find(name string) bool {
	manifest, err := sharedimages.Parse(name)
	if err != nil {
		return false
	}
	ctx, cancel := context.WithTimeout(context.Background(), findTime)
	defer cancel()
	select {
	case c.finding <- struct{}{}:
		defer func() { <-c.finding }()
	case <-ctx.Done():
		return true
	}
	if err := c.find(ctx, manifest); err != nil {
		c.cfg.Log.Debug("image is not there", "image", manifest, "err", err)
	}
	return true
}

// find adds an image. Precondition: finding is held.
func (c *Client) find(ctx context.Context, manifest digest.Digest) error {
	for {
		l, changed, err := c.wanted(manifest)
		if err != nil || l == nil && changed == nil {
			return err
		}
		if l == nil {
			select {
			case <-changed:
				continue
			case <-ctx.Done():
				return ctx.Err()
			}
		}
		f, err := c.open(ctx, l, manifest)
		if err == nil {
			if err = c.add(f); err != nil {
				c.giveBack(ctx, l, f.handle)
			}
			return err
		}
		if !errors.Is(err, errLost) {
			return err
		}
		select { // until Run has noticed, too
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// wanted returns the connection on which an image is to be asked for, if there is
// one, and what to wait for else; neither when it is there.
func (c *Client) wanted(manifest digest.Digest) (l *link, changed <-chan struct{}, err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch {
	case c.files[manifest] != nil:
		return nil, nil, nil
	case c.ended:
		return nil, nil, errLost
	case len(c.files) >= maxFiles || c.full():
		return nil, nil, fmt.Errorf("%d images with %d descriptors are open already: %w", len(c.files), c.used.Load(), errdefs.ErrResourceExhausted)
	}
	return c.link, c.changed, nil
}

// add makes an image appear.
func (c *Client) add(f *file) error {
	var node uint64
	if c.cfg.Node != nil {
		node = c.cfg.Node(f.name)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		f.close()
		return errLost
	}
	if err := c.cfg.Directory.AddAs(node, f.name, f); err != nil {
		f.close()
		return err
	}
	c.files[f.manifest] = f
	if f.link != c.link { // lost meanwhile
		f.link, f.since = nil, time.Now()
		c.wake()
	}
	c.cfg.Log.Info("serve image", "file", f.name, "size", f.desc.Size)
	return nil
}
