package hostimages

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/containerd/errdefs"

	"github.com/tatami-containers/tatami/protocols/sharedimages"
)

// keep opens files again on l that are not open, and drops those that are not
// granted any more, until ctx ends.
func (c *Client) keep(ctx context.Context, l *link) {
	look := time.NewTicker(c.cfg.Idle)
	defer look.Stop()
	var retry <-chan time.Time
	for delay := firstRetry; ; {
		select {
		case <-ctx.Done():
			return
		case <-look.C:
			c.sweep(ctx, l)
			continue
		case <-c.kick:
			delay = firstRetry
		case <-retry:
			delay = min(2*delay, maxRetry)
		}
		retry = nil
		if !c.reopenAll(ctx, l) {
			retry = time.After(delay)
		}
	}
}

// reopenAll opens the files that are not open, and says whether none is left.
func (c *Client) reopenAll(ctx context.Context, l *link) bool {
	all := true
	for _, f := range c.those(func(f *file) bool { return f.link == nil && f.err == nil }) {
		err := c.reopen(ctx, l, f)
		switch {
		case err == nil || ctx.Err() != nil:
		case errdefs.IsNotFound(err) && c.hopeless(l, f):
			c.drop(ctx, l, f)
		default:
			all = false
		}
	}
	return all
}

// hopeless says of a file that is not granted on l whether it will not be any more.
// After tatami-host was started anew it is granted again a little later, however
// long there was none.
func (c *Client) hopeless(l *link, f *file) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return f.gone || time.Since(f.since) >= c.cfg.Patience && time.Since(l.began) >= c.cfg.Patience
}

func (c *Client) those(want func(*file) bool) []*file {
	c.mu.Lock()
	defer c.mu.Unlock()
	var out []*file
	for _, f := range c.files {
		if want(f) {
			out = append(out, f)
		}
	}
	return out
}

// reopen opens a file on l, in place of its handle there if it has one.
func (c *Client) reopen(ctx context.Context, l *link, f *file) error {
	again, err := c.open(ctx, l, f.manifest)
	if err != nil {
		return err
	}
	defer again.close()
	var other error
	if !f.same(again) {
		other = fmt.Errorf("the node has another image of this manifest now; start the container again: %w", errdefs.ErrDataLoss)
	}
	c.mu.Lock()
	handle := again.handle // the one that is not used
	switch {
	case other != nil:
		f.err = other
	case f.link == l:
		f.handle, handle = handle, f.handle
		f.gone = false
	default:
		f.link, f.handle, f.gone, handle = l, handle, false, 0
	}
	c.wake()
	c.mu.Unlock()
	if other != nil {
		c.cfg.Log.Error("image cannot be read any more", "file", f.name, "err", other)
	}
	if handle != 0 {
		c.giveBack(ctx, l, handle)
	}
	return nil
}

// giveBack closes a handle. It may be lost already.
func (c *Client) giveBack(ctx context.Context, l *link, handle uint32) {
	_, err := l.do(ctx, sharedimages.Header{Op: sharedimages.Close, Handle: handle}, nil, nil)
	if err != nil && !errdefs.IsNotFound(err) && !errors.Is(err, errLost) && ctx.Err() == nil {
		c.cfg.Log.Warn("tatami-host does not take an image back", "err", err)
	}
}

// sweep drops the images that are not granted any more and that nobody reads. One
// that was granted again meanwhile stays.
func (c *Client) sweep(ctx context.Context, l *link) {
	idle := c.those(func(f *file) bool {
		seen := f.seen
		f.seen = f.uses.Load()
		return f.gone && f.seen == seen
	})
	for _, f := range idle {
		if err := c.reopen(ctx, l, f); errdefs.IsNotFound(err) {
			c.drop(ctx, l, f)
		}
	}
}

// drop makes an image disappear.
func (c *Client) drop(ctx context.Context, l *link, f *file) {
	c.mu.Lock()
	delete(c.files, f.manifest)
	at, handle := f.link, f.handle
	c.mu.Unlock()
	c.cfg.Directory.Remove(f.name)
	f.close()
	if at == l {
		c.giveBack(ctx, l, handle)
	}
	c.cfg.Log.Info("image is gone", "file", f.name)
}
