package vhostvsock

import (
	"bytes"
	"context"
	"io"
	"net"
	"path/filepath"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/protocols/vsock"
	"github.com/tatami-containers/tatami/virtiofs/vhostuser"
	"github.com/tatami-containers/tatami/virtiofs/vhostuser/vhosttest"
)

const (
	testCID  = 7
	ringNum  = 64
	bufLen   = headerLen + 4096
	rxBufs   = 0x10_000
	txBufs   = 0x80_000
	memSize  = 0x200_000
	waitMS   = 10_000
	silentMS = 100 // for what must not come
)

// guest plays the driver.
type guest struct {
	t      testing.TB
	fe     *vhosttest.Frontend
	rx, tx *vhosttest.Ring
	txNext int
	alloc  uint32 // the credit that it gives
}

type packet struct {
	header
	data []byte
}

// start runs a device and a guest on it.
func start(t *testing.T, cfg Config) (path string, g *guest) {
	t.Helper()
	dir := t.TempDir()
	cfg.CID, cfg.Path = testCID, filepath.Join(dir, "host")
	vmm := filepath.Join(dir, "vmm")
	s, err := Listen(cfg, vmm)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Serve(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Errorf("Serve: %v", err)
		}
		if n := s.Conns(); n != 0 {
			t.Errorf("%d connections left", n)
		}
	})
	fe := vhosttest.Dial(t, vmm, memSize)
	fe.Negotiate(0)
	fe.AddMemory()
	g = &guest{t: t, fe: fe, alloc: 1 << 20, rx: fe.NewRing(queueRX, ringNum, 0), tx: fe.NewRing(queueTX, ringNum, vhosttest.RingBytes(ringNum))}
	g.rx.Start()
	g.tx.Start()
	g.post()
	return cfg.Path, g
}

// post offers all receive buffers.
func (g *guest) post() {
	for i := range ringNum {
		g.rx.SetDesc(i, vhosttest.Desc{Addr: uint64(vhosttest.GuestBase + rxBufs + i*bufLen), Len: bufLen, Flags: vhosttest.Write})
		g.rx.Queue(uint16(i))
	}
	g.rx.Kick()
}

// next receives a packet.
func (g *guest) next() packet {
	g.t.Helper()
	p, ok := g.poll(waitMS)
	if !ok {
		g.t.Fatal("no packet came")
	}
	return p
}

func (g *guest) poll(timeout int) (packet, bool) {
	head, n, ok := g.rx.WaitUsed(timeout)
	if !ok {
		return packet{}, false
	}
	b := bytes.Clone(g.fe.Mem[rxBufs+int(head)*bufLen:][:n])
	g.rx.Offer(head)
	p := packet{header: parseHeader((*[headerLen]byte)(b)), data: b[headerLen:]}
	if int(p.len) != len(p.data) || p.srcCID != vsock.HostCID || p.dstCID != testCID || p.typ != typeStream {
		g.t.Errorf("bad packet %+v with %d bytes", p.header, len(p.data))
	}
	return p, true
}

// expect receives a packet that must be o.
func (g *guest) expect(o op) packet {
	g.t.Helper()
	p := g.next()
	if p.op != o {
		g.t.Fatalf("got packet %d (%q), want %d", p.op, p.data, o)
	}
	return p
}

// silent asserts that no packet comes.
func (g *guest) silent() {
	g.t.Helper()
	if p, ok := g.poll(silentMS); ok {
		g.t.Fatalf("got packet %d (%q), want none", p.op, p.data)
	}
}

// send sends h with good addresses and the length of data.
func (g *guest) send(h header, data string) {
	g.t.Helper()
	h.srcCID, h.dstCID, h.typ, h.len = testCID, vsock.HostCID, typeStream, uint32(len(data))
	g.sendRaw(h, data)
}

func (g *guest) sendRaw(h header, data string) {
	g.t.Helper()
	i := g.txNext
	g.txNext = (i + 1) % 16
	off := txBufs + i*(headerLen+maxPacket)
	b := h.encode()
	copy(g.fe.Mem[off:], b[:])
	copy(g.fe.Mem[off+headerLen:], data)
	g.tx.SetDesc(i, vhosttest.Desc{Addr: uint64(vhosttest.GuestBase + off), Len: uint32(headerLen + len(data))})
	g.tx.Offer(uint16(i))
	if _, _, ok := g.tx.WaitUsed(waitMS); !ok {
		g.t.Fatal("the transmit queue is stuck")
	}
}

// reply sends o for the connection that p belongs to.
func (g *guest) reply(p packet, o op, flags uint32, data string) {
	g.t.Helper()
	g.send(header{srcPort: p.dstPort, dstPort: p.srcPort, op: o, flags: flags, bufAlloc: g.alloc}, data)
}

// accept connects a client of the node to guest port 5.
func (g *guest) accept(path string) (*net.UnixConn, packet) {
	g.t.Helper()
	type result struct {
		c   net.Conn
		err error
	}
	ch := make(chan result, 1)
	go func() {
		c, err := vsock.Dial(context.Background(), "hybrid:"+path+":5")
		ch <- result{c, err}
	}()
	p := g.expect(opRequest)
	if p.dstPort != 5 || p.bufAlloc == 0 {
		g.t.Errorf("request %+v", p.header)
	}
	g.reply(p, opResponse, 0, "")
	r := <-ch
	if r.err != nil {
		g.t.Fatal(r.err)
	}
	g.t.Cleanup(func() { _ = r.c.Close() }) // tests close it themselves, too
	return r.c.(*net.UnixConn), p
}

func read(t *testing.T, c net.Conn, n int) string {
	t.Helper()
	b := make([]byte, n)
	k, err := io.ReadFull(c, b)
	if err != nil {
		t.Fatalf("read %d bytes of %d: %v", k, n, err)
	}
	return string(b)
}

func write(t *testing.T, c net.Conn, s string) {
	t.Helper()
	if _, err := io.WriteString(c, s); err != nil {
		t.Fatal(err)
	}
}

func wantEnd(t *testing.T, c net.Conn) {
	t.Helper()
	if b, err := io.ReadAll(c); len(b) > 0 {
		t.Fatalf("read %q, %v; want the end", b, err)
	}
}

func TestHostConnects(t *testing.T) {
	path, g := start(t, Config{})
	c, p := g.accept(path)
	write(t, c, "to the guest")
	if p := g.expect(opData); string(p.data) != "to the guest" {
		t.Errorf("got %q", p.data)
	}
	g.reply(p, opData, 0, "to the host")
	if s := read(t, c, 11); s != "to the host" {
		t.Errorf("got %q", s)
	}
	// Half close, host first: the other direction goes on.
	if err := c.CloseWrite(); err != nil {
		t.Fatal(err)
	}
	if p := g.expect(opShutdown); p.flags != shutSend {
		t.Errorf("shutdown with flags %d", p.flags)
	}
	g.reply(p, opData, 0, "more")
	read(t, c, 4)
	g.reply(p, opShutdown, shutSend|shutReceive, "")
	g.expect(opReset)
	wantEnd(t, c)
}

func TestGuestEndsFirst(t *testing.T) {
	path, g := start(t, Config{})
	c, p := g.accept(path)
	g.reply(p, opData, 0, "all")
	g.reply(p, opShutdown, shutSend, "")
	if b, err := io.ReadAll(c); string(b) != "all" || err != nil {
		t.Fatalf("read %q, %v", b, err)
	}
	write(t, c, "answer")
	if p := g.expect(opData); string(p.data) != "answer" {
		t.Errorf("got %q", p.data)
	}
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	g.expect(opReset)
	g.silent()
}

func TestGuestConnects(t *testing.T) {
	path, g := start(t, Config{})
	l, err := vsock.Listen("hybrid:" + path + ":9")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	g.send(header{srcPort: 100, dstPort: 9, op: opRequest, bufAlloc: 1 << 16}, "")
	c, err := l.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p := g.expect(opResponse)
	if p.srcPort != 9 || p.dstPort != 100 || p.bufAlloc != defaultBuffer {
		t.Errorf("response %+v", p.header)
	}
	g.reply(p, opData, 0, "hello")
	if s := read(t, c, 5); s != "hello" {
		t.Errorf("got %q", s)
	}
	g.reply(p, opReset, 0, "")
	wantEnd(t, c)
	g.silent()
}

func TestRefusals(t *testing.T) {
	path, g := start(t, Config{})
	good := header{srcCID: testCID, dstCID: vsock.HostCID, typ: typeStream, srcPort: 1, dstPort: 2}
	for name, h := range map[string]header{
		"nobody listens": {op: opRequest}, "data": {op: opData}, "response": {op: opResponse}, "unknown": {op: 99}, "zero": {},
	} {
		t.Run(name, func(t *testing.T) {
			x := good
			x.op = h.op
			g.sendRaw(x, "")
			if p := g.expect(opReset); p.srcPort != 2 || p.dstPort != 1 {
				t.Errorf("reset %+v", p.header)
			}
		})
	}
	seqpacket, long := good, good
	seqpacket.typ, seqpacket.op = 2, opRequest
	g.sendRaw(seqpacket, "")
	g.expect(opReset)
	long.op, long.len = opRequest, 1
	g.sendRaw(long, "")
	g.expect(opReset)
	reset, src, dst := good, good, good
	reset.op, src.srcCID, dst.dstCID = opReset, 8, 3
	for _, h := range []header{reset, src, dst} {
		g.sendRaw(h, "")
	}
	g.silent()

	done := make(chan error, 1)
	go func() {
		_, err := vsock.Dial(context.Background(), "hybrid:"+path+":5")
		done <- err
	}()
	g.reply(g.expect(opRequest), opReset, 0, "")
	if err := <-done; err == nil {
		t.Error("a refused connection was reported open")
	}
}

func TestCreditOfTheGuest(t *testing.T) {
	path, g := start(t, Config{})
	g.alloc = 100
	c, p := g.accept(path)
	update := header{srcPort: p.dstPort, dstPort: p.srcPort, op: opCreditUpdate, bufAlloc: 100}
	write(t, c, string(make([]byte, 250)))
	for _, want := range []int{100, 100, 50} {
		got := 0
		for got < want {
			got += len(g.expect(opData).data)
		}
		if got != want {
			t.Fatalf("%d bytes, credit was %d", got, want)
		}
		g.silent()
		update.fwdCnt += uint32(want)
		g.send(update, "")
	}
}

// fill sends n bytes in packets.
func (g *guest) fill(p packet, n int) {
	g.t.Helper()
	data := string(make([]byte, 32<<10))
	for ; n > 0; n -= len(data) {
		g.reply(p, opData, 0, data[:min(n, len(data))])
	}
}

// stuff gives a connection more than its host peer's socket takes.
func (g *guest) stuff(c *net.UnixConn, p packet) {
	g.t.Helper()
	if err := c.SetReadBuffer(4096); err != nil {
		g.t.Fatal(err)
	}
	g.fill(p, 256<<10)
}

func TestSlowHostPeer(t *testing.T) {
	path, g := start(t, Config{Buffer: 1 << 20})
	slow, sp := g.accept(path)
	fast, fp := g.accept(path)
	g.stuff(slow, sp)
	g.stuff(slow, sp) // within the credit of 1 MiB, but the peer does not read
	// Neither the transmit nor the receive queue waits for it.
	g.reply(fp, opData, 0, "past")
	read(t, fast, 4)
	write(t, fast, "past")
	for g.next().op != opData { // updates of the credit may come first
	}
	read(t, slow, 512<<10)
	g.reply(sp, opShutdown, shutSend, "")
	wantEnd(t, slow)
}

func TestOverrun(t *testing.T) {
	path, g := start(t, Config{Buffer: 64 << 10})
	c, p := g.accept(path)
	other, op2 := g.accept(path)
	data := string(make([]byte, 32<<10))
	for i := range 64 {
		g.reply(p, opData, 0, data)
		if q, ok := g.poll(1); ok && q.op == opReset {
			break
		} else if i == 63 {
			t.Fatal("no reset after 2 MiB beyond the credit")
		}
	}
	if _, err := io.ReadAll(c); err != nil {
		t.Logf("the host peer's end: %v", err)
	}
	g.reply(op2, opData, 0, "unharmed")
	read(t, other, 8)
}

func TestCreditToTheGuest(t *testing.T) {
	path, g := start(t, Config{Buffer: 64 << 10})
	c, p := g.accept(path)
	g.fill(p, 48<<10)
	read(t, c, 48<<10)
	if u := g.expect(opCreditUpdate); u.fwdCnt == 0 || u.bufAlloc != 64<<10 {
		t.Errorf("update %+v", u.header)
	}
	for {
		if _, ok := g.poll(silentMS); !ok {
			break
		}
	}
	g.reply(p, opCreditRequest, 0, "")
	if u := g.expect(opCreditUpdate); u.fwdCnt != 48<<10 {
		t.Errorf("update says %d bytes", u.fwdCnt)
	}
}

// A peer that answers and leaves while the guest still sends: the answer arrives.
func TestHostPeerLeaves(t *testing.T) {
	path, g := start(t, Config{})
	c, p := g.accept(path)
	g.fe.Do(vhosttest.SetVringEnable, vhosttest.U32(queueRX, 0)) // holds the answer back
	write(t, c, "answer")
	if err := c.Close(); err != nil {
		t.Fatal(err)
	}
	for range 8 {
		g.reply(p, opData, 0, "into the void")
	}
	g.fe.Do(vhosttest.SetVringEnable, vhosttest.U32(queueRX, 1))
	var got []byte
	for {
		q := g.next()
		if q.op == opReset {
			break
		}
		got = append(got, q.data...)
	}
	if string(got) != "answer" {
		t.Errorf("the guest got %q", got)
	}
}

func TestGuestReadsNoMore(t *testing.T) {
	path, g := start(t, Config{})
	c, p := g.accept(path)
	g.reply(p, opShutdown, shutReceive, "")
	for {
		if _, err := io.WriteString(c, "x"); err != nil { // EPIPE, in time
			break
		}
		time.Sleep(time.Millisecond)
	}
	g.reply(p, opData, 0, "still sends")
	read(t, c, 11)
	g.reply(p, opShutdown, shutSend|shutReceive, "")
	for g.next().op != opReset { // what was on its way before comes first
	}
}

func TestPauseKeepsConnections(t *testing.T) {
	path, g := start(t, Config{})
	c, p := g.accept(path)
	for range 5 {
		g.fe.SetMemory(1)
		write(t, c, "ping")
		if q := g.expect(opData); string(q.data) != "ping" {
			t.Fatalf("got %q", q.data)
		}
		g.reply(p, opData, 0, "pong")
		read(t, c, 4)
	}
}

// A pause while the credit is owed and there are no buffers must not lose it.
func TestPauseKeepsCredit(t *testing.T) {
	path, g := start(t, Config{Buffer: 64 << 10})
	c, p := g.accept(path)
	g.fe.Do(vhosttest.SetVringEnable, vhosttest.U32(queueRX, 0))
	g.fill(p, 64<<10)
	read(t, c, 64<<10)
	g.fe.Do(vhosttest.SetVringEnable, vhosttest.U32(queueRX, 1))
	for g.expect(opCreditUpdate).fwdCnt != 64<<10 {
	}
}

func TestRebootEndsConnections(t *testing.T) {
	path, g := start(t, Config{})
	for range 3 {
		c, _ := g.accept(path)
		g.rx.Stop()
		g.tx.Stop()
		wantEnd(t, c)
		if _, err := vsock.Dial(t.Context(), "hybrid:"+path+":5"); err == nil {
			t.Error("connected to a guest that does not run")
		}
		g.tx.Restart()
		g.rx.Restart()
		g.post()
	}
}

func TestBrokenRing(t *testing.T) {
	path, g := start(t, Config{})
	c, _ := g.accept(path)
	g.tx.Offer(ringNum)
	wantEnd(t, c)
	if _, err := vsock.Dial(t.Context(), "hybrid:"+path+":5"); err == nil {
		t.Error("connected to a broken device")
	}
	g.rx.Stop()
	g.tx.Stop()
	g.tx.Restart()
	g.rx.Restart()
	g.post()
	g.accept(path)
}

func TestTooManyConnections(t *testing.T) {
	path, g := start(t, Config{MaxConns: 2})
	l, err := vsock.Listen("hybrid:" + path + ":9")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	g.accept(path)
	g.accept(path)
	if _, err := vsock.Dial(t.Context(), "hybrid:"+path+":5"); err == nil {
		t.Error("a third connection of the node was accepted")
	}
	for i, want := range []op{opResponse, opResponse, opReset} {
		g.send(header{srcPort: uint32(i), dstPort: 9, op: opRequest, bufAlloc: 1 << 16}, "")
		g.expect(want)
	}
}

// Receive buffers without room for a packet are given back, not used.
func TestSmallBuffers(t *testing.T) {
	path, g := start(t, Config{})
	c, _ := g.accept(path)
	for i := range ringNum {
		n := uint32(bufLen)
		if i%2 == 0 {
			n = uint32(i) // some hold a header, some not even that
		}
		g.rx.SetDesc(i, vhosttest.Desc{Addr: uint64(vhosttest.GuestBase + rxBufs + i*bufLen), Len: n, Flags: vhosttest.Write})
	}
	want := bytes.Repeat([]byte("0123456789"), 20<<10)
	go func() { _, _ = c.Write(want) }() // what is missing is seen below
	var got []byte
	for len(got) < len(want) {
		head, n, ok := g.rx.WaitUsed(waitMS)
		if !ok {
			t.Fatalf("stuck after %d bytes", len(got))
		}
		if n > 0 {
			got = append(got, g.fe.Mem[rxBufs+int(head)*bufLen+headerLen:][:n-headerLen]...)
		}
		g.rx.Offer(head)
	}
	if !bytes.Equal(got, want) {
		t.Error("bytes were lost or mixed up")
	}
}

func TestListenRefuses(t *testing.T) {
	for _, cfg := range []Config{{}, {CID: 2, Path: "x"}, {CID: 3}, {CID: 3, Path: "x", Buffer: 1}} {
		if _, err := Listen(cfg, filepath.Join(t.TempDir(), "vmm")); err == nil {
			t.Errorf("%+v was accepted", cfg)
		}
	}
}

// FuzzReceive gives the device packets of the guest without any queue.
func FuzzReceive(f *testing.F) {
	for o := range op(9) {
		h := header{srcCID: testCID, dstCID: vsock.HostCID, typ: typeStream, op: o, srcPort: 1, dstPort: 2, bufAlloc: 9, flags: 3}
		b := h.encode()
		f.Add(b[:], uint8(20))
	}
	f.Fuzz(func(t *testing.T, data []byte, split uint8) {
		ctx, cancel := context.WithCancel(context.Background())
		cfg := Config{CID: testCID, Path: filepath.Join(t.TempDir(), "none"), Buffer: 4096}
		if err := cfg.complete(); err != nil {
			t.Fatal(err)
		}
		d := newDevice(ctx, cfg)
		c := newConn(d, key{hostPort: 2, guestPort: 1})
		d.conns[c.key] = c
		for len(data) > 0 {
			k := min(int(split)+1, len(data))
			n := min(headerLen+8, len(data))
			d.receive([][]byte{data[:min(k, n)], data[min(k, n):n]})
			data = data[n:]
		}
		if int64(len(c.pending)) > cfg.Buffer || len(d.resets) > maxResets {
			t.Errorf("kept %d bytes, %d resets", len(c.pending), len(d.resets))
		}
		cancel()
		d.Stopped(queueRX)
		d.wg.Wait()
	})
}

func TestBuffers(t *testing.T) {
	bufs := [][]byte{[]byte("abc"), []byte("defg"), []byte("h")}
	var all []byte
	_, rest := skip(cut(bufs, 6), 4)
	for _, b := range rest {
		all = append(all, b...)
	}
	if string(all) != "ef" {
		t.Errorf("got %q", all)
	}
	if vhostuser.Len(rest) != 2 {
		t.Errorf("length %d", vhostuser.Len(rest))
	}
}
