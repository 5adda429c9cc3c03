package store_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/shared"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// attach opens segment k of an image as another process does.
func attach(t *testing.T, i *store.Image, k int) *shared.Segment {
	t.Helper()
	s, err := i.Share(k)
	check(t, err)
	seg, err := shared.Open(s.State, s.Data, s.Off)
	check(t, err)
	t.Cleanup(func() { check(t, seg.Close()) })
	return seg
}

// mapped reads all that a share gives, compares it with the segment's bytes and
// returns how much it is.
func mapped(t *testing.T, s *shared.Segment, plain []byte) int64 {
	t.Helper()
	total := int64(0)
	for off := int64(0); off < s.Size(); {
		f, at, n, stamp := s.Map(off)
		if n == 0 {
			off += 4 * kiB
			continue
		}
		got := make([]byte, n)
		_, err := f.ReadAt(got, at)
		check(t, err)
		if !s.Valid(stamp) || !bytes.Equal(got, plain[off:off+n]) {
			t.Errorf("wrong or invalid bytes: %d at %d", n, off)
		}
		total, off = total+n, off+n
	}
	return total
}

func stateFiles(t *testing.T, cfg store.Config) int {
	t.Helper()
	entries, err := os.ReadDir(filepath.Join(cfg.Dir, "shared"))
	check(t, err)
	return len(entries)
}

// A share follows the segment from its first chunk to its end.
func TestShare(t *testing.T) {
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s := open(t, cfg)
	img := storetest.NewImage("shared", storetest.Solid(1, 4*miB), storetest.Solid(2, miB))
	plain := img.Plain[firstChunk : firstChunk+4*miB]
	i := openImage(t, s, img, storetest.NewSource("good", img))
	check(t, i.Prefetch(context.Background(), firstChunk, miB))
	seg, again := attach(t, i, 0), attach(t, i, 0)
	if n := mapped(t, seg, plain); n != miB {
		t.Errorf("%d KiB mapped", n/kiB)
	}
	check(t, i.Prefetch(context.Background(), firstChunk+2*miB, miB))
	if n := mapped(t, again, plain); n != 2*miB {
		t.Errorf("%d KiB mapped after a fetch", n/kiB)
	}
	if n := stateFiles(t, cfg); n != 1 {
		t.Errorf("%d state files", n)
	}
	_, err := i.Materialize(context.Background())
	check(t, err)
	if n := mapped(t, seg, plain); n != 0 || !seg.Moved() || !again.Moved() || stateFiles(t, cfg) != 0 {
		t.Errorf("%d KiB mapped of what has moved", n/kiB)
	}
	seg = attach(t, i, 0)
	other := attach(t, i, 1)
	if n, m := mapped(t, seg, plain), mapped(t, other, img.Plain[firstChunk+4*miB:]); n != 4*miB || m != miB {
		t.Errorf("%d and %d KiB mapped of the complete file", n/kiB, m/kiB)
	}
	check(t, i.Close())
	if n := mapped(t, seg, plain); n != 0 || seg.Moved() || stateFiles(t, cfg) != 0 {
		t.Errorf("%d KiB mapped of what is closed", n/kiB)
	}
	if _, err := i.Share(0); !errors.Is(err, os.ErrClosed) {
		t.Errorf("share when closed: %v", err)
	}
	if _, err := i.Boot(); !errors.Is(err, os.ErrClosed) {
		t.Errorf("boot when closed: %v", err)
	}
}

// Chunks that are linked, or become so, are not shared, and the disk that they give
// back is not read.
func TestShareLinked(t *testing.T) {
	a, b := versions()
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s := open(t, cfg)
	ia := openImage(t, s, a, storetest.NewSource("a", a))
	fill(t, ia)
	ib := openImage(t, s, b, storetest.NewSource("b", b))
	check(t, ib.Prefetch(context.Background(), firstChunk, 8*miB))
	seg := attach(t, ib, 0)
	if n := mapped(t, seg, b.Plain[firstChunk:]); n != 8*miB-sharedBytes {
		t.Errorf("%d KiB mapped of an image with links", n/kiB)
	}
	check(t, ib.Close())
	check(t, s.Remove(b.Index.Manifest))

	g := b.Index.Segments[0]
	ib = openImage(t, s, b)
	old := attach(t, ib, 0)
	ingest(t, s, storetest.Segment{Table: g.Table, Plain: b.Plain[g.Off:g.End()]})
	if !old.Moved() {
		t.Error("ingested into the old file")
	}
	seg = attach(t, ib, 0)
	eventually(t, func() bool { return onDisk(t, dataFile(cfg, b)) <= 8*miB-sharedBytes+128*kiB })
	if n := mapped(t, seg, b.Plain[firstChunk:]); n != 8*miB-sharedBytes {
		t.Errorf("%d KiB mapped after chunks were linked", n/kiB)
	}
	cut := attach(t, ia, 0)
	check(t, ia.Close())
	check(t, s.Remove(a.Index.Manifest)) // b reads some of it still
	if n := mapped(t, cut, a.Plain[firstChunk:]); n != sharedBytes {
		t.Errorf("%d KiB mapped of what was cut down", n/kiB)
	}
}

func TestShareRefuses(t *testing.T) {
	img := storetest.NewImage("refuses", storetest.Solid(1, miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		i := openImage(t, open(t, cfg), img)
		for k, want := range map[int]func(error) bool{-1: errdefs.IsInvalidArgument, 1: errdefs.IsInvalidArgument, 0: nil} {
			if !cfg.Keep {
				want = errdefs.IsFailedPrecondition
			}
			s, err := i.Share(k)
			if want == nil && err == nil {
				check(t, s.Close())
			} else if want == nil || !want(err) {
				t.Errorf("segment %d: %v", k, err)
			}
		}
	})
}

func TestShareDiskFull(t *testing.T) {
	dir := mount(t, "tmpfs", "tmpfs", "size=1m", 0)
	img := storetest.NewImage("full", storetest.Solid(1, 256*kiB))
	i := openImage(t, open(t, store.Config{Dir: dir, Keep: true}), img, storetest.NewSource("good", img))
	sameAll(t, i, img.Plain, 128*kiB)
	f, err := os.Create(filepath.Join(dir, "ballast"))
	check(t, err)
	for err == nil {
		_, err = f.Write(make([]byte, 4*kiB))
	}
	check(t, f.Close())
	if _, err := i.Share(0); !errdefs.IsResourceExhausted(err) {
		t.Errorf("share: %v", err)
	}
	check(t, os.Remove(f.Name()))
	mapped(t, attach(t, i, 0), img.Plain[firstChunk:])
}

func TestBoot(t *testing.T) {
	img := storetest.NewImage("boot", storetest.Solid(1, miB))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		f, err := openImage(t, open(t, cfg), img).Boot()
		check(t, err)
		defer f.Close()
		got, err := io.ReadAll(f)
		if err != nil || !bytes.Equal(got, img.Plain[:firstChunk]) {
			t.Errorf("%d bytes, %v", len(got), err)
		}
	})
}

// A process that gets the descriptors can write nothing with them, nor open the
// files again for that.
func TestShareReadOnly(t *testing.T) {
	if os.Getenv(childRole) != "" {
		tryToWrite(t)
		return
	}
	img := storetest.NewImage("read only", storetest.Solid(1, miB))
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	i := openImage(t, open(t, cfg), img, storetest.NewSource("good", img))
	fill(t, i)
	for _, whole := range []bool{false, true} {
		if whole {
			_, err := i.Materialize(context.Background())
			check(t, err)
		}
		ours, theirs := socketPair(t)
		s, err := i.Share(0)
		check(t, err)
		boot, err := i.Boot()
		check(t, err)
		seg := attach(t, i, 0)
		cmd, out := startRole(t, "reader", cfg.Dir, theirs, nil)
		_, err = ours.Write([]byte("x")) // what is sent does not matter
		check(t, err)
		rights := unix.UnixRights(int(s.State.Fd()), int(s.Data.Fd()), int(boot.Fd()))
		check(t, unix.Sendmsg(int(ours.Fd()), []byte("fds"), rights, nil, 0))
		if err := cmd.Wait(); err != nil {
			t.Errorf("reader: %v\n%s", err, out)
		}
		check(t, errors.Join(s.Close(), boot.Close(), ours.Close(), theirs.Close()))
		if n := mapped(t, seg, img.Plain[firstChunk:]); n != miB {
			t.Errorf("%d KiB mapped", n/kiB)
		}
	}
	sameAll(t, i, img.Plain, 128*kiB)
}

func tryToWrite(t *testing.T) {
	root := os.Getuid() == 0
	becomeNobody(t)
	buf, oob := make([]byte, 16), make([]byte, unix.CmsgSpace(12))
	var fds []int
	for len(fds) == 0 {
		_, n, _, _, err := unix.Recvmsg(childSock, buf, oob, unix.MSG_CMSG_CLOEXEC)
		check(t, err)
		cmsgs, err := unix.ParseSocketControlMessage(oob[:n])
		check(t, err)
		if len(cmsgs) > 0 {
			fds, err = unix.ParseUnixRights(&cmsgs[0])
			check(t, err)
		}
	}
	for k, fd := range fds {
		_, err := unix.Pwrite(fd, []byte{1}, 0)
		_, mapErr := unix.Mmap(fd, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		mem, readErr := unix.Mmap(fd, 0, 4096, unix.PROT_READ, unix.MAP_SHARED)
		check(t, readErr)
		tries := map[string]error{
			"write": err, "map": mapErr, "protect": unix.Mprotect(mem, unix.PROT_READ|unix.PROT_WRITE),
			"truncate": unix.Ftruncate(fd, 0), "punch": unix.Fallocate(fd, unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 0, 4096),
		}
		if root {
			f, err := os.OpenFile(fmt.Sprintf("/proc/self/fd/%d", fd), os.O_RDWR, 0)
			tries["open again"], tries["change mode"] = err, unix.Fchmod(fd, 0o666)
			if err == nil {
				check(t, f.Close())
			}
		}
		for what, err := range tries {
			if err == nil {
				t.Errorf("descriptor %d: %s is possible", k, what)
			}
		}
		check(t, unix.Munmap(mem))
		flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
		check(t, err)
		_, err = unix.FcntlInt(uintptr(fd), unix.F_SETFL, flags|unix.O_APPEND|unix.O_NOATIME) // nothing of the store's
		if err != nil && !errors.Is(err, unix.EPERM) {
			t.Error(err)
		}
	}
}

// A chunk that is linked and whose target loses it before its disk is given back is
// not fetched into what is being punched: share's work is done first.
func TestTargetLostBeforePunch(t *testing.T) {
	a, b := versions()
	c := storetest.NewImage("the third", storetest.Cut(64*kiB, a.Plain[firstChunk+5*miB:]))
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	s := open(t, cfg)
	var ib, ic *store.Image
	done := make(chan struct{})
	armed := false
	s.SetSync(func(f *os.File) error {
		switch isA := sameName(t, f, dataFile(cfg, a)); {
		case !armed:
		case isA:
			s.Flush() // b's chunks are durable before they are linked: the bits have to be written before they go
		case ic == nil && s.Stats().SharedBytes > 0: // that is now: b's chunks are linked
			ic = openImage(t, s, c)
			rot(t, dataFile(cfg, a), 5*miB, 7*miB)
			if err := ic.Prefetch(context.Background(), firstChunk, 2*miB); !errdefs.IsUnavailable(err) {
				t.Errorf("prefetch without a source: %v", err)
			}
			eventually(t, func() bool { return s.Stats().VerifyFailures == 2*miB/(64*kiB) })
			go func() {
				defer close(done)
				same(t, ib, b.Plain, firstChunk+miB, 2*miB)
			}()
			select {
			case <-done:
				t.Error("the read did not wait")
			case <-time.After(300 * time.Millisecond):
			}
		}
		return f.Sync()
	})
	ia := openImage(t, s, a, storetest.NewSource("a", a))
	fill(t, ia)
	s.Scanned()
	ib = openImage(t, s, b, storetest.NewSource("b", b))
	armed = true
	g := b.Index.Segments[0]
	ingest(t, s, storetest.Segment{Table: g.Table, Plain: b.Plain[g.Off:g.End()]})
	select {
	case <-done:
	case <-time.After(time.Minute):
		t.Fatal("the target was not lost in time")
	}
	sameAll(t, ib, b.Plain, 128*kiB)
	check(t, s.Close())
	s = open(t, cfg)
	sameAll(t, openImage(t, s, b, storetest.NewSource("b", b)), b.Plain, 128*kiB)
}

// sameName says whether f is the file of that name, whatever it was called when it
// was opened.
func sameName(t *testing.T, f *os.File, name string) bool {
	st, err := f.Stat()
	check(t, err)
	other, err := os.Stat(name)
	return err == nil && os.SameFile(st, other)
}

// What is shared when the store is closed can be read on, until it is opened again:
// then it may go.
func TestShareOutlivesStore(t *testing.T) {
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	img := storetest.NewImage("outlives", storetest.Solid(1, 2*miB))
	plain := img.Plain[firstChunk:]
	s := open(t, cfg)
	i := openImage(t, s, img, storetest.NewSource("good", img))
	check(t, i.Prefetch(context.Background(), firstChunk, miB))
	seg := attach(t, i, 0)
	check(t, s.Close())
	if n := mapped(t, seg, plain); n != miB || stateFiles(t, cfg) != 1 {
		t.Errorf("%d KiB mapped of a closed store", n/kiB)
	}
	s = open(t, cfg)
	if n := mapped(t, seg, plain); n != 0 || stateFiles(t, cfg) != 0 {
		t.Errorf("%d KiB mapped of a store that is open again", n/kiB)
	}
	i = openImage(t, s, img)
	seg = attach(t, i, 0)
	if n := mapped(t, seg, plain); n != miB {
		t.Errorf("%d KiB mapped", n/kiB)
	}
	s.KeepShares()
	check(t, i.Close())
	s.Press() // nothing makes way any more
	settle(t, s)
	if n := mapped(t, seg, plain); n != miB {
		t.Errorf("%d KiB mapped of an image that was closed before the store", n/kiB)
	}
	_, _, _, stamp := seg.Map(0)
	i = openImage(t, s, img) // from here on bytes may go
	if n := mapped(t, seg, plain); n != 0 || seg.Valid(stamp) || stateFiles(t, cfg) != 0 {
		t.Errorf("%d KiB mapped of a segment that was opened again", n/kiB)
	}
	seg = attach(t, i, 0)
	check(t, i.Close())
	check(t, s.Close())
	check(t, s.Close())
	if n := mapped(t, seg, plain); n != miB || stateFiles(t, cfg) != 1 {
		t.Errorf("%d KiB mapped at the end", n/kiB)
	}
}

// Who may read one image gets no descriptor of another one's file, which has a segment
// of both.
func TestShareOfAnotherImage(t *testing.T) {
	base := storetest.Solid(1, miB)
	a, b := storetest.NewImage("a", base, storetest.Solid(2, miB)), storetest.NewImage("b", base)
	s := open(t, store.Config{Dir: t.TempDir(), Keep: true})
	ia, ib := openImage(t, s, a, storetest.NewSource("a", a)), openImage(t, s, b, storetest.NewSource("b", b))
	fill(t, ia)
	old := attach(t, ib, 0)
	_, err := ia.Materialize(context.Background())
	check(t, err)
	if !old.Moved() {
		t.Error("the segment has not moved")
	}
	if _, err := ib.Share(0); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("share: %v", err)
	}
	if n := mapped(t, attach(t, ia, 0), a.Plain[firstChunk:]); n != miB {
		t.Errorf("%d KiB mapped", n/kiB)
	}
	sameAll(t, ib, b.Plain, 128*kiB)
}
