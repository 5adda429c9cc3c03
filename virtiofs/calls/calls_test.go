package calls

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// pair is two ends with a handler each.
func pair(t *testing.T, ha, hb Handler) (a, b *Conn) {
	t.Helper()
	fa, fb, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	a, b = end(t, fa, ha), end(t, fb, hb)
	return a, b
}

func end(t *testing.T, f *os.File, h Handler) *Conn {
	t.Helper()
	c, err := New(f)
	if err != nil {
		t.Fatal(err)
	}
	c.Start(h)
	t.Cleanup(func() { _ = c.Close() }) // tests may have done so
	return c
}

// raw is an end that may say anything, and the other one.
func raw(t *testing.T, h Handler) (*Conn, *net.UnixConn) {
	t.Helper()
	fa, fb, err := Pair()
	if err != nil {
		t.Fatal(err)
	}
	nc, err := net.FileConn(fb)
	if err := errors.Join(err, fb.Close()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { nc.Close() })
	return end(t, fa, h), nc.(*net.UnixConn)
}

func temp(t *testing.T, text string) *os.File {
	t.Helper()
	f, err := os.CreateTemp(t.TempDir(), "")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	if _, err := f.WriteString(text); err != nil {
		t.Fatal(err)
	}
	return f
}

// bound is more than any of it takes.
func bound(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

type words struct{ Text string }

// Calls go both ways at once, and one may be made to answer another.
func TestCalls(t *testing.T) {
	var a *Conn
	ops := Ops{
		"join": Op(2, func(_ context.Context, w words, files []*os.File) (words, error) {
			for _, f := range files {
				b := make([]byte, 3)
				if _, err := f.ReadAt(b, 0); err != nil {
					return words{}, err
				}
				w.Text += string(b)
				if err := f.Close(); err != nil {
					return words{}, err
				}
			}
			return w, nil
		}),
	}
	reached := make(chan struct{})
	upper := Ops{"upper": Op(0, func(_ context.Context, w words, _ []*os.File) (words, error) {
		return words{strings.ToUpper(w.Text)}, nil
	})}
	var b *Conn
	ops["back"] = Op(0, func(ctx context.Context, w words, _ []*os.File) (words, error) {
		<-reached
		var got words
		_, err := b.Call(ctx, "upper", w, &got)
		return got, err
	})
	a, b = pair(t, upper.Handle, ops.Handle)
	close(reached)
	one, two := temp(t, "one"), temp(t, "two")
	var group sync.WaitGroup
	for i := range 4 * maxCalls { // more than may be under way
		group.Go(func() {
			var got words
			if _, err := a.Call(bound(t), "join", words{fmt.Sprint(i)}, &got, one, two); err != nil || got.Text != fmt.Sprintf("%donetwo", i) {
				t.Errorf("%d: %q, %v", i, got, err)
			}
			if _, err := a.Call(bound(t), "back", words{fmt.Sprintf("x%d", i)}, &got); err != nil || got.Text != fmt.Sprintf("X%d", i) {
				t.Errorf("%d: %q, %v", i, got, err)
			}
		})
	}
	group.Wait()
}

func TestDescriptorsInAnswers(t *testing.T) {
	f := temp(t, "text")
	a, _ := pair(t, nil, func(context.Context, string, json.RawMessage, []*os.File) (any, []*os.File, error) {
		fd, err := unix.Dup(int(f.Fd()))
		return nil, []*os.File{os.NewFile(uintptr(fd), "copy")}, err
	})
	files, err := a.Call(bound(t), "get", nil, nil)
	if err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}
	defer files[0].Close()
	if b, err := io.ReadAll(io.NewSectionReader(files[0], 0, 10)); string(b) != "text" {
		t.Errorf("%q, %v", b, err)
	}
}

func TestErrors(t *testing.T) {
	a, _ := pair(t, nil, Ops{
		"none": Op(0, func(context.Context, words, []*os.File) (words, error) {
			return words{}, fmt.Errorf("x: %w", errdefs.ErrNotFound)
		}),
		"large": Op(0, func(context.Context, words, []*os.File) (words, error) {
			return words{}, errors.New(strings.Repeat("x", 2*maxMessage))
		}),
		"result": Op(0, func(context.Context, words, []*os.File) (chan int, error) { return make(chan int), nil }),
	}.Handle)
	for _, tc := range []struct {
		op    string
		args  any
		files int
		is    func(error) bool
	}{
		{"none", words{}, 0, errdefs.IsNotFound}, {"other", words{}, 0, errdefs.IsNotImplemented},
		{"none", 7, 0, errdefs.IsInvalidArgument}, {"none", words{}, 1, errdefs.IsInvalidArgument},
		{"large", words{}, 0, func(err error) bool { return len(err.Error()) < 2*maxText }},
		{"result", words{}, 0, func(err error) bool { return strings.Contains(err.Error(), "json") }},
		{"none", words{strings.Repeat("x", maxMessage)}, 0, func(err error) bool { return strings.Contains(err.Error(), "at most") }},
		{"none", words{}, maxFiles + 1, func(err error) bool { return strings.Contains(err.Error(), "at most") }},
	} {
		var files []*os.File
		for range tc.files {
			files = append(files, temp(t, ""))
		}
		if _, err := a.Call(bound(t), tc.op, tc.args, nil, files...); err == nil || !tc.is(err) || errors.Is(err, ErrLost) {
			t.Errorf("%s with %d descriptors: %v", tc.op, tc.files, err)
		}
	}
}

// A caller that gives up hears of nothing later, and its place is free.
func TestGivenUp(t *testing.T) {
	release := make(chan struct{})
	a, _ := pair(t, nil, func(context.Context, string, json.RawMessage, []*os.File) (any, []*os.File, error) {
		<-release
		return nil, nil, nil
	})
	ctx, cancel := context.WithCancel(bound(t))
	failed := make(chan error, maxCalls)
	for range maxCalls {
		go func() {
			_, err := a.Call(ctx, "wait", nil, nil)
			failed <- err
		}()
	}
	cancel()
	for range maxCalls {
		if err := <-failed; !errors.Is(err, context.Canceled) {
			t.Error(err)
		}
	}
	close(release)
}

func TestLost(t *testing.T) {
	started := make(chan struct{})
	a, b := pair(t, nil, func(ctx context.Context, _ string, _ json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		close(started)
		<-ctx.Done()
		return nil, nil, ctx.Err()
	})
	failed := make(chan error, 1)
	go func() {
		_, err := a.Call(bound(t), "wait", nil, nil)
		failed <- err
	}()
	<-started
	if err := b.Close(); err != nil {
		t.Error(err)
	}
	if err := <-failed; !errors.Is(err, ErrLost) || !errdefs.IsUnavailable(err) {
		t.Error(err)
	}
	if _, err := a.Call(bound(t), "wait", nil, nil); !errors.Is(err, ErrLost) {
		t.Error(err)
	}
}

func TestHostile(t *testing.T) {
	wait := func(ctx context.Context, _ string, _ json.RawMessage, _ []*os.File) (any, []*os.File, error) {
		<-ctx.Done()
		return nil, nil, nil
	}
	for _, tc := range []struct {
		name string
		say  func(c *net.UnixConn) error
	}{
		{"no JSON", func(c *net.UnixConn) error { _, err := c.Write([]byte("{")); return err }},
		{"too long", func(c *net.UnixConn) error { _, err := c.Write(bytes.Repeat([]byte(" "), maxMessage+1)); return err }},
		{"descriptors", func(c *net.UnixConn) error {
			_, _, err := c.WriteMsgUnix([]byte("{}"), unix.UnixRights(make([]int, maxFiles+1)...), nil)
			return err
		}},
		{"calls", func(c *net.UnixConn) error {
			for range maxCalls + 1 {
				if _, err := c.Write([]byte(`{"id":1,"op":"x"}`)); err != nil {
					return err
				}
			}
			return nil
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			c, peer := raw(t, wait)
			if err := tc.say(peer); err != nil {
				t.Fatal(err)
			}
			select {
			case <-c.Context().Done():
			case <-bound(t).Done():
				t.Error("the connection is still there")
			}
		})
	}
}

// open is the number of descriptors of this process.
func open(t *testing.T) int {
	t.Helper()
	e, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(e)
}

// Whatever descriptors come with, they are closed.
func TestNothingLeaks(t *testing.T) {
	before := open(t)
	fail := Ops{"fail": Op(1, func(_ context.Context, _ words, files []*os.File) (words, error) {
		return words{}, errors.Join(errors.New("no"), files[0].Close())
	})}
	c, peer := raw(t, fail.Handle)
	for _, text := range []string{`{"id":1}`, `{"id":1,"op":"other"}`, `{"id":1,"op":"fail"}`, `{"id":1,"op":"fail","data":7}`, `{"id":1,"op":"fail","data":{}}`, `{`} {
		if _, _, err := peer.WriteMsgUnix([]byte(text), unix.UnixRights(0, 0), nil); err != nil {
			t.Fatal(err)
		}
	}
	<-c.Context().Done()
	if err := errors.Join(c.Close(), peer.Close()); err != nil {
		t.Fatal(err)
	}
	if after := open(t); after > before {
		t.Errorf("%d descriptors were open, now %d", before, after)
	}
}

func FuzzMessages(f *testing.F) {
	for _, s := range []string{`{"id":1,"op":"say","data":{"Text":"x"}}`, `{"id":1,"error":{"class":"not found","text":"x"}}`, `{"id":1}`, `{"op":7}`, ``, `[]`} {
		f.Add([]byte(s), true)
	}
	f.Fuzz(func(t *testing.T, b []byte, file bool) {
		c, peer := raw(t, Ops{"say": Op(0, func(_ context.Context, w words, _ []*os.File) (words, error) { return w, nil })}.Handle)
		var oob []byte
		if file {
			oob = unix.UnixRights(0)
		}
		if _, _, err := peer.WriteMsgUnix(b[:min(len(b), maxMessage)], oob, nil); err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(peer.CloseWrite(), c.Close()); err != nil {
			t.Error(err)
		}
	})
}

// An end that takes no messages does not hold up the other one.
func TestStalled(t *testing.T) {
	a, _ := raw(t, nil)
	a.stall = 10 * time.Millisecond
	var group sync.WaitGroup
	for range maxCalls { // more than a socket holds
		group.Go(func() {
			if _, err := a.Call(bound(t), "x", words{strings.Repeat("x", maxMessage/2)}, nil); !errors.Is(err, ErrLost) {
				t.Errorf("call: %v", err)
			}
		})
	}
	group.Wait()
	if a.Context().Err() == nil {
		t.Error("the connection goes on")
	}
}
