// Package link puts a slower network in front of a server: a TCP proxy whose
// connections share one bandwidth and each see one round-trip time. It stands
// in for tc-netem, which not every kernel has.
package link

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"
)

const (
	piece  = 16 << 10 // bytes that move at once
	window = 4 << 20  // bytes under way in one direction of one connection
)

// Shape is what a link does to its traffic. The zero value does nothing.
type Shape struct {
	Rate int64         // bytes a second, each direction; 0 means no limit
	RTT  time.Duration // added round-trip time
}

// ParseShape reads "1gbit,5ms": a rate in bit/s with k, m or g, and a
// round-trip time. Either part may be missing.
func ParseShape(s string) (Shape, error) {
	var sh Shape
	for part := range strings.SplitSeq(s, ",") {
		part = strings.TrimSpace(part)
		if part == "" {
			continue
		}
		if bits, ok := strings.CutSuffix(part, "bit"); ok {
			r, err := parseRate(bits)
			if err != nil {
				return Shape{}, fmt.Errorf("link %q: %w", s, err)
			}
			sh.Rate = r
			continue
		}
		d, err := time.ParseDuration(part)
		if err != nil || d < 0 {
			return Shape{}, fmt.Errorf("link %q: %q is neither a rate like 1gbit nor a round-trip time like 5ms", s, part)
		}
		sh.RTT = d
	}
	return sh, nil
}

func parseRate(s string) (int64, error) {
	unit := int64(1)
	for suffix, u := range map[string]int64{"k": 1e3, "m": 1e6, "g": 1e9} {
		if rest, ok := strings.CutSuffix(s, suffix); ok {
			s, unit = rest, u
			break
		}
	}
	n, err := strconv.ParseInt(s, 10, 32)
	if err != nil || n <= 0 {
		return 0, fmt.Errorf("rate %q is not a positive number", s)
	}
	return n * unit / 8, nil
}

// Link forwards connections to one address.
type Link struct {
	target   string
	shape    Shape
	up, down *pacer
	moved    atomic.Int64
	wg       sync.WaitGroup
}

// New makes a link to the TCP address target.
func New(target string, s Shape) *Link {
	return &Link{target: target, shape: s,
		up:   &pacer{clock: wallClock{}, rate: s.Rate},
		down: &pacer{clock: wallClock{}, rate: s.Rate}}
}

// Bytes is what came from the target through the link so far.
func (l *Link) Bytes() int64 { return l.moved.Load() }

// Serve accepts connections until ctx ends; then it closes all of them, waits
// and returns nil. It may be called for several listeners.
func (l *Link) Serve(ctx context.Context, ln net.Listener) error {
	stop := context.AfterFunc(ctx, func() { _ = ln.Close() })
	defer stop()
	defer l.wg.Wait()
	for {
		c, err := ln.Accept()
		if err != nil {
			if ctx.Err() != nil || errors.Is(err, net.ErrClosed) {
				return nil
			}
			return fmt.Errorf("accept on link to %s: %w", l.target, err)
		}
		l.wg.Go(func() { l.forward(ctx, c) })
	}
}

// forward connects c with the target until both directions have ended.
func (l *Link) forward(ctx context.Context, c net.Conn) {
	defer c.Close()
	if err := (wallClock{}).Sleep(ctx, l.shape.RTT); err != nil { // the handshake's round trip
		return
	}
	var d net.Dialer
	t, err := d.DialContext(ctx, "tcp", l.target)
	if err != nil {
		return // the client sees its connection closed, as behind a dead hop
	}
	defer t.Close()
	stop := context.AfterFunc(ctx, func() { _ = c.Close(); _ = t.Close() })
	defer stop()
	var both sync.WaitGroup
	both.Go(func() { l.oneWay(ctx, t, c, l.up, nil) })
	both.Go(func() { l.oneWay(ctx, c, t, l.down, &l.moved) })
	both.Wait()
}

// parcel is some bytes and when they arrive.
type parcel struct {
	data []byte
	at   time.Time
}

// oneWay moves bytes from src to dst, late by half the round-trip time.
func (l *Link) oneWay(ctx context.Context, dst, src net.Conn, p *pacer, count *atomic.Int64) {
	road := make(chan parcel, window/piece)
	var wg sync.WaitGroup
	wg.Go(func() { deliver(ctx, dst, road) })
	for {
		buf := make([]byte, piece)
		n, err := src.Read(buf)
		if n > 0 {
			at, werr := p.take(ctx, n)
			if werr != nil {
				break
			}
			if count != nil {
				count.Add(int64(n))
			}
			road <- parcel{buf[:n], at.Add(l.shape.RTT / 2)}
		}
		if err != nil {
			break
		}
	}
	close(road)
	wg.Wait()
}

// deliver writes each parcel when it is due and passes the end on. It takes
// everything from road, also after an error, so that the sender never blocks.
func deliver(ctx context.Context, dst net.Conn, road <-chan parcel) {
	var failed error
	for p := range road {
		if failed == nil {
			failed = (wallClock{}).Sleep(ctx, time.Until(p.at))
		}
		if failed == nil {
			_, failed = dst.Write(p.data)
		}
	}
	if hc, ok := dst.(interface{ CloseWrite() error }); ok && failed == nil {
		_ = hc.CloseWrite() // the peer may be gone already
		return
	}
	if !errors.Is(failed, io.EOF) {
		_ = dst.Close()
	}
}
