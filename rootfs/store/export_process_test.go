package store_test

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/shared"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// A store that changes all the time, is killed and starts again, in one process,
// and in another one a reader of what it shares, with another user's rights: no
// byte that the reader takes for valid is wrong. This process starts both and
// holds the socket between them.
func TestSharedWithProcess(t *testing.T) {
	switch os.Getenv(childRole) {
	case "store":
		changeUntilKilled(t)
	case "reader":
		readShares(t)
		return
	}
	dir := memoryDir(t)
	ours, theirs := socketPair(t)
	reader, out := startRole(t, "reader", dir, theirs, nil)
	check(t, theirs.Close())
	rnd := rand.New(rand.NewPCG(1, 1))
	for life, enough := 0, false; life < minLives || !enough; life++ {
		if life == maxLives {
			t.Fatal("the reader has not seen enough")
		}
		s, said := startRole(t, "store", dir, ours, []string{fmt.Sprintf("%s=%d", childSeed, life)})
		ended := make(chan error, 1)
		go func() { ended <- s.Wait() }()
		select {
		case err := <-ended:
			check(t, ours.Close())
			t.Fatalf("store of life %d ended: %v\n%s\nreader: %v\n%s", life, err, said, reader.Wait(), out)
		case <-time.After(200*time.Millisecond + time.Duration(rnd.Int64N(int64(300*time.Millisecond)))):
		}
		check(t, s.Process.Kill())
		if err := <-ended; err == nil {
			t.Error("a store that was killed ended well")
		}
		if _, _, err := unix.Recvfrom(int(ours.Fd()), make([]byte, 1), unix.MSG_DONTWAIT); err == nil {
			enough = true
		}
	}
	check(t, ours.Close())
	if err := reader.Wait(); err != nil {
		t.Fatalf("reader: %v\n%s", err, out)
	}
	line, _, _ := strings.Cut(out.String(), "\n")
	t.Log(line)
}

// How often the store is started: until the reader has seen enough.
const (
	minLives = 20
	maxLives = 500
)

const (
	childRole = "TATAMI_TEST_ROLE"
	childSeed = "TATAMI_TEST_SEED"
	childSock = 3 // descriptor
)

// memoryDir is a directory of a filesystem without disk, so that there are many
// rounds in little time, or else any.
func memoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "tatami-") //nolint:usetesting // t.TempDir is on a disk
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { check(t, os.RemoveAll(dir)) })
	return dir
}

func socketPair(t *testing.T) (a, b *os.File) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	check(t, err)
	return os.NewFile(uintptr(fds[0]), "store's end"), os.NewFile(uintptr(fds[1]), "reader's end")
}

// startRole starts this test once more as one of the two processes.
func startRole(t *testing.T, role, dir string, sock *os.File, env []string) (*exec.Cmd, *bytes.Buffer) {
	t.Helper()
	exe, err := os.Executable()
	check(t, err)
	name, _, _ := strings.Cut(t.Name(), "/")
	cmd := exec.CommandContext(t.Context(), exe, "-test.run=^"+name+"$")
	cmd.Env = append(append(os.Environ(), childRole+"="+role, childDir+"="+dir), env...)
	cmd.ExtraFiles = []*os.File{sock}
	out := new(bytes.Buffer)
	cmd.Stdout, cmd.Stderr = out, os.Stderr
	check(t, cmd.Start())
	return cmd, out
}

// conn is the socket of a child.
func conn(t *testing.T) *net.UnixConn {
	t.Helper()
	f := os.NewFile(childSock, "socket")
	c, err := net.FileConn(f)
	check(t, errors.Join(err, f.Close()))
	return c.(*net.UnixConn)
}

// send gives a share of an image's segment to the reader.
func send(t *testing.T, c *net.UnixConn, which int, s *store.Share) {
	t.Helper()
	msg := binary.LittleEndian.AppendUint64([]byte{byte(which)}, uint64(s.Off))
	_, _, err := c.WriteMsgUnix(msg, unix.UnixRights(int(s.State.Fd()), int(s.Data.Fd())), nil)
	check(t, errors.Join(err, s.Close()))
}

// receive is the other end of send; the segment is nil at the end.
func receive(t *testing.T, c *net.UnixConn) (which int, seg *shared.Segment) {
	t.Helper()
	msg, oob := make([]byte, 9), make([]byte, unix.CmsgSpace(8))
	n, oobn, _, _, err := c.ReadMsgUnix(msg, oob)
	if n == 0 {
		return 0, nil
	}
	check(t, err)
	cmsgs, err := unix.ParseSocketControlMessage(oob[:oobn])
	check(t, err)
	fds, err := unix.ParseUnixRights(&cmsgs[0])
	check(t, err)
	seg, err = shared.Open(os.NewFile(uintptr(fds[0]), "state"), os.NewFile(uintptr(fds[1]), "data"), int64(binary.LittleEndian.Uint64(msg[1:])))
	check(t, err)
	return int(msg[0]), seg
}

// sharers are the two images of the test: of one segment each, and most chunks of
// the second are the first's.
func sharers() []*storetest.Image {
	a := storetest.Solid(1, 2*miB)
	own := storetest.Solid(2, miB/2)
	return []*storetest.Image{
		storetest.NewImage("a", a),
		storetest.NewImage("b+", storetest.Cut(64*kiB, a.Plain[miB/2:], own.Plain, a.Plain[:miB/4])),
	}
}

// tally is what the reader has seen.
type tally struct{ shares, valid, invalid, absent, moved int }

// enough says that all that may happen to a share has, many times.
func (n *tally) enough() bool {
	return n.shares >= 200 && n.valid >= 10_000 && n.invalid >= 20 && n.absent > 0 && n.moved >= 20
}

// becomeNobody gives up root's rights, so that the descriptors are all that the
// process has. As any process, it may look at its own descriptors in /proc.
func becomeNobody(t *testing.T) {
	t.Helper()
	if os.Getuid() == 0 {
		check(t, errors.Join(unix.Setgroups(nil), unix.Setgid(65534), unix.Setuid(65534), unix.Prctl(unix.PR_SET_DUMPABLE, 1, 0, 0, 0)))
	}
}

// readShares reads from what the store shares, old and new, until the socket ends.
func readShares(t *testing.T) {
	c := conn(t)
	becomeNobody(t)
	r := reader{t: t, images: sharers(), rnd: rand.New(rand.NewPCG(7, 7)), buf: make([]byte, 2*miB)}
	arrived := make(chan share)
	go func() {
		defer close(arrived)
		for {
			which, seg := receive(t, c)
			if seg == nil {
				return
			}
			arrived <- share{seg, r.images[which].Plain[r.images[which].Index.Segments[0].Off:]}
		}
	}()
	for told := false; !t.Failed(); {
		if !told && r.enough() {
			_, err := c.Write([]byte("x"))
			check(t, err)
			told = true
		}
		select {
		case s, ok := <-arrived:
			if !ok {
				fmt.Printf("%+v\n", r.tally)
				return
			}
			r.add(s)
		default:
			r.round()
		}
	}
}

// share is a segment of a store and its contents.
type share struct {
	*shared.Segment
	plain []byte
}

type reader struct {
	tally
	t      *testing.T
	images []*storetest.Image
	rnd    *rand.Rand
	buf    []byte
	held   []share
}

const maxHeld = 6 // shares, the oldest are closed

func (r *reader) add(s share) {
	r.shares++
	if r.held = append(r.held, s); len(r.held) > maxHeld {
		if r.held[0].Moved() {
			r.moved++
		}
		check(r.t, r.held[0].Close())
		r.held = r.held[1:]
	}
}

// round reads from each share once.
func (r *reader) round() {
	for _, s := range r.held {
		off := r.rnd.Int64N(s.Size())
		f, at, n, stamp := s.Map(off)
		if n == 0 {
			r.absent++
			continue
		}
		n = min(n, 1+r.rnd.Int64N(miB))
		got, err := f.ReadAt(r.buf[:n], at)
		if !s.Valid(stamp) {
			r.invalid++
			continue
		}
		r.valid++
		if want := s.plain[off : off+n]; err != nil || !bytes.Equal(r.buf[:got], want) {
			zeros := bytes.Count(r.buf[:got], []byte{0})
			r.t.Errorf("after %+v: %d bytes at %d: got %d, %d of them zeros, %v", r.tally, n, off, got, zeros, err)
		}
	}
}

// changer changes a store and shares what it has with the reader.
type changer struct {
	t      *testing.T
	c      *net.UnixConn
	rnd    *rand.Rand
	cfg    store.Config
	s      *store.Store
	disk   *failingDisk
	images []*storetest.Image
	src    *storetest.Source
}

func changeUntilKilled(t *testing.T) {
	var seed uint64
	_, err := fmt.Sscan(os.Getenv(childSeed), &seed)
	check(t, err)
	w := changer{t: t, c: conn(t), rnd: rand.New(rand.NewPCG(seed, 2)), disk: &failingDisk{}, images: sharers(),
		cfg: store.Config{Dir: os.Getenv(childDir), Keep: true}}
	w.src = storetest.NewSource("good", w.images...)
	w.s, err = store.Open(w.cfg)
	check(t, err)
	w.s.SetSync(w.disk.sync)
	w.s.Scanned()
	w.heir()
	for {
		w.round()
	}
}

func (w *changer) open(k int) *store.Image {
	i, err := w.s.OpenImage(context.Background(), w.images[k].Index, []store.Source{w.src})
	check(w.t, err)
	w.share(i, k)
	return i
}

func (w *changer) share(i *store.Image, k int) {
	s, err := i.Share(0)
	check(w.t, err)
	send(w.t, w.c, k, s)
}

func (w *changer) pause() { time.Sleep(time.Duration(w.rnd.Int64N(int64(3 * time.Millisecond)))) }

// heir makes something of what an earlier life has left. When all of the first
// image is there and the second is linked to it, some of the first is punched.
func (w *changer) heir() {
	a, b := w.open(0), w.open(1)
	w.pause()
	check(w.t, a.Close())
	check(w.t, w.s.Remove(w.images[0].Index.Manifest))
	w.pause()
	check(w.t, b.Close())
	w.clear()
}

func (w *changer) clear() {
	for _, i := range w.s.Images() {
		check(w.t, w.s.Remove(i.Manifest))
	}
	_, err := w.s.GC()
	check(w.t, err)
}

func (w *changer) round() {
	a := w.open(0)
	w.lose(a)
	check(w.t, a.Fill(context.Background()))
	b := w.open(1)
	if w.rnd.IntN(2) == 0 { // links from the start
		check(w.t, b.Fill(context.Background()))
	} else { // own chunks that become links
		g := w.images[1].Index.Segments[0]
		ingest(w.t, w.s, storetest.Segment{Table: g.Table, Plain: w.images[1].Plain[g.Off:g.End()]})
		w.share(b, 1)
	}
	w.pause()
	if w.rnd.IntN(2) == 0 {
		w.s.Flush()
	}
	if w.rnd.IntN(3) == 0 {
		k := w.rnd.IntN(2)
		i := []*store.Image{a, b}[k]
		_, err := i.Materialize(context.Background())
		check(w.t, err)
		w.share(i, k)
	}
	w.leave(a, b)
}

// leave removes the images, first the one that the other is linked to, which may be
// open still.
func (w *changer) leave(a, b *store.Image) {
	first := w.rnd.IntN(2) == 0
	if first {
		check(w.t, b.Close())
	}
	check(w.t, a.Close())
	w.pause()
	check(w.t, w.s.Remove(w.images[0].Index.Manifest))
	w.pause()
	if !first {
		check(w.t, b.Close())
	}
	w.clear()
}

// lose makes a sync fail, and when the store has dropped the chunks that it
// covered, they go.
func (w *changer) lose(i *store.Image) {
	const n = miB / 2
	check(w.t, i.Prefetch(context.Background(), firstChunk, n))
	w.s.Flush()
	before := i.Present()
	check(w.t, i.Prefetch(context.Background(), firstChunk+n, n))
	fetched := i.Present() - before
	w.pause()
	w.disk.failNext(0, 0)
	w.s.Flush()
	w.disk.heal()
	if fetched != n || i.Present() != before {
		return // the chunks were there before, or another segment's sync has failed
	}
	f, err := os.OpenFile(dataFile(w.cfg, w.images[0]), os.O_RDWR, 0)
	check(w.t, err)
	check(w.t, unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, n, n))
	check(w.t, f.Close())
	w.pause()
}
