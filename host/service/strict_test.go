package service

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
	"github.com/containerd/ttrpc"
	"google.golang.org/protobuf/proto"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
)

// strictRig is a sandbox whose guest connects to the Host service over pipes,
// which hold no byte that nobody reads.
type strictRig struct {
	*sandbox
	port *fakePort
	log  bytes.Buffer // read it after the sandbox is closed
}

func newStrictRig(t *testing.T, stall time.Duration) *strictRig {
	t.Helper()
	newPort := func() *fakePort { return &fakePort{conns: make(chan net.Conn), done: make(chan struct{})} }
	r := &strictRig{port: newPort()}
	s := New(Config{Stall: stall, Log: slog.New(slog.NewTextHandler(&r.log, nil))})
	var err error
	if r.sandbox, err = newSandbox(s, "guest", place{}); err != nil {
		t.Fatal(err)
	}
	r.serve(r.port, newPort())
	t.Cleanup(func() { r.close(t.Context()) }) // perhaps a second time
	return r
}

// dial connects as a guest that does not wait for ever.
func (r *strictRig) dial(t *testing.T) net.Conn {
	t.Helper()
	c := r.port.connect(0)
	if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		t.Fatal(err)
	}
	return c
}

// client returns what a well-behaved guest uses.
func (r *strictRig) client(t *testing.T) api.HostService {
	t.Helper()
	c := ttrpc.NewClient(r.port.connect(0))
	t.Cleanup(func() { _ = c.Close() }) // the test is over
	return api.NewHostClient(c)
}

func answers(t *testing.T, h api.HostService) {
	t.Helper()
	_, err := h.Describe(t.Context(), &api.DescribeRequest{ContainerId: "absent"})
	if err = errgrpc.ToNative(err); !errdefs.IsNotFound(err) {
		t.Errorf("a well-behaved client gets %v", err)
	}
}

// frame is one as ttrpc sends it.
func frame(stream uint32, kind, flags byte, payload []byte) []byte {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(payload)))
	b = binary.BigEndian.AppendUint32(b, stream)
	return append(append(b, kind, flags), payload...)
}

// describe is the frame of a Describe.
func describe(stream uint32, container string) []byte {
	args := must(proto.Marshal(&api.DescribeRequest{ContainerId: container}))
	return frame(stream, 1, 0, must(proto.Marshal(&ttrpc.Request{Service: "tatami.v1.Host", Method: "Describe", Payload: args})))
}

func must(b []byte, err error) []byte {
	if err != nil {
		panic(err)
	}
	return b
}

// cutOff wants the peer to close the connection before it answers.
func cutOff(t *testing.T, c net.Conn) {
	t.Helper()
	if b, err := io.ReadAll(c); err != nil || len(b) > 0 {
		t.Errorf("read %d bytes, %v; want the end", len(b), err)
	}
}

// What a guest must not send ends its connection, at once and however it is cut,
// and neither the server nor another client notices.
func TestStrictRefuses(t *testing.T) {
	req := describe(1, "c")
	tooLong := frame(1, 1, 0, make([]byte, maxFrame+1))
	for name, sent := range map[string][]byte{
		"data":            slices.Concat(req, frame(1, 3, 0, nil)),
		"end of the data": slices.Concat(req, frame(1, 3, 1|4, nil)),
		"response":        slices.Concat(req, frame(1, 2, 0, nil)),
		"unknown type":    slices.Concat(req, frame(3, 9, 0, nil)),
		"too long":        tooLong[:headerLen],
		"far too long":    {0xff, 0xff, 0xff, 0xff, 0, 0, 0, 1, 1, 0},
	} {
		for _, step := range []int{len(sent), 7, 1} {
			t.Run(fmt.Sprintf("%s by %d", name, step), func(t *testing.T) {
				r := newStrictRig(t, 0)
				other := r.client(t)
				for range hostConns + 1 { // refused ones do not count
					r.refuses(t, sent, step)
				}
				answers(t, other)
				answers(t, r.client(t))
				r.close(t.Context())
				if log := r.log.String(); strings.Count(log, "level=WARN") != 1 || !strings.Contains(log, "sandbox=guest") {
					t.Errorf("logged %s", log)
				}
			})
		}
	}
}

// refuses sends while the server has not answered, so that the stream of the
// request is open.
func (r *strictRig) refuses(t *testing.T, sent []byte, step int) {
	t.Helper()
	r.mu.Lock()
	defer r.mu.Unlock()
	c := r.dial(t)
	defer c.Close()
	for part := range slices.Chunk(sent, step) {
		if _, err := c.Write(part); err != nil {
			t.Fatal(err)
		}
	}
	cutOff(t, c)
}

// A guest that reads no answer costs little, and nothing once it is cut off.
func TestStrictFlood(t *testing.T) {
	for _, busy := range []bool{false, true} {
		t.Run(fmt.Sprintf("busy %v", busy), func(t *testing.T) {
			r := newStrictRig(t, 0)
			answers(t, r.client(t))
			goroutines, heap := runtime.NumGoroutine(), heapInUse()
			if busy {
				r.mu.Lock()
			}
			c := r.dial(t)
			sent := flood(c, 1000)
			if sent < maxUnanswered || sent > maxUnanswered+2 {
				t.Errorf("cut off after %d requests", sent)
			}
			if more := heapInUse() - heap; more > 8<<20 {
				t.Errorf("%d bytes are held", more)
			}
			cutOff(t, c)
			if busy {
				r.mu.Unlock()
			}
			goroutinesReturn(t, goroutines)
			answers(t, r.client(t))
		})
	}
}

// flood returns after how many requests the connection was closed.
func flood(c net.Conn, requests int) int {
	for i := range requests {
		if _, err := c.Write(describe(uint32(2*i+1), strings.Repeat("c", 60_000))); err != nil {
			return i
		}
	}
	return requests
}

func heapInUse() int64 {
	var m runtime.MemStats
	runtime.GC()
	runtime.ReadMemStats(&m)
	return int64(m.HeapAlloc)
}

func goroutinesReturn(t *testing.T, want int) {
	t.Helper()
	for end := time.Now().Add(10 * time.Second); runtime.NumGoroutine() > want; time.Sleep(time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("%d goroutines, %d before", runtime.NumGoroutine(), want)
		}
	}
}

// One answer that is not read is waited for no longer than the stall.
func TestStrictStall(t *testing.T) {
	r := newStrictRig(t, 50*time.Millisecond)
	goroutines := runtime.NumGoroutine()
	c := r.dial(t)
	if _, err := c.Write(describe(1, "c")); err != nil {
		t.Fatal(err)
	}
	goroutinesReturn(t, goroutines)
	cutOff(t, c)
}

// A client may have as many calls under way as are allowed, for ever.
func TestStrictConcurrent(t *testing.T) {
	r := newStrictRig(t, 0)
	h := r.client(t)
	var wg sync.WaitGroup
	for range maxUnanswered {
		wg.Go(func() {
			for range 200 {
				answers(t, h)
			}
		})
	}
	wg.Wait()
	r.close(t.Context())
	if r.log.Len() > 0 {
		t.Errorf("logged %s", &r.log)
	}
}

// Frames are found however the bytes are cut.
func TestFrames(t *testing.T) {
	var sent []byte
	var want []uint32
	for i := range 20 {
		sent = append(sent, frame(1, byte(i), 0, make([]byte, i*i))...)
		want = append(want, uint32(i*i), uint32(i))
	}
	for step := 1; step <= len(sent); step++ {
		var f frames
		var got []uint32
		for part := range slices.Chunk(sent, step) {
			err := f.follow(part, func(size uint32, kind byte) error {
				got = append(got, size, uint32(kind))
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		if !slices.Equal(got, want) {
			t.Fatalf("by %d: %v", step, got)
		}
	}
	if err := new(frames).follow(sent, func(uint32, byte) error { return os.ErrInvalid }); !errors.Is(err, os.ErrInvalid) {
		t.Errorf("error %v", err)
	}
}
