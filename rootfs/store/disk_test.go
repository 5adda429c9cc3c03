package store_test

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"

	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// mount makes a filesystem for one test.
func mount(t *testing.T, source, fstype, data string, flags uintptr) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: mounts a filesystem")
	}
	dir := t.TempDir()
	if err := unix.Mount(source, dir, fstype, flags, data); err != nil {
		t.Fatalf("mount %s: %v", fstype, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(dir, 0); err != nil && !errors.Is(err, unix.EINVAL) {
			t.Errorf("unmount %s: %v", fstype, err)
		}
	})
	return dir
}

// A full disk costs the keeping, not the reading.
func TestDiskFull(t *testing.T) {
	dir := mount(t, "tmpfs", "tmpfs", "size=3m", 0)
	img := storetest.NewImage("full", storetest.Solid(1, 8*miB))
	src := storetest.NewSource("good", img)
	s := open(t, store.Config{Dir: dir, Keep: true})
	i := openImage(t, s, img, src)
	sameAll(t, i, img.Plain, 128*kiB)
	sameAll(t, i, img.Plain, 128*kiB)
	if s.Stats().KeepFailures == 0 || i.Complete() {
		t.Errorf("%d keep failures, complete: %v", s.Stats().KeepFailures, i.Complete())
	}
	if n := src.Bytes(); n > 24*miB {
		t.Errorf("%d MiB fetched for 16 MiB of reads", n/miB)
	}
	if err := i.Fill(context.Background()); !errdefs.IsResourceExhausted(err) || !errors.Is(err, unix.ENOSPC) {
		t.Errorf("fill: %v", err)
	}
	if _, err := i.Materialize(context.Background()); !errors.Is(err, unix.ENOSPC) {
		t.Errorf("materialize: %v", err)
	}
}

// The same on ext4, where the space comes back.
func TestDiskFullForAWhile(t *testing.T) {
	dir := mount(t, loopDevice(t, filesystem(t, 24*miB)), "ext4", "", 0)
	ballast := filepath.Join(dir, "ballast")
	check(t, os.WriteFile(ballast, nil, 0o600))
	f, err := os.OpenFile(ballast, os.O_WRONLY, 0)
	check(t, err)
	for _, err = f.Write(make([]byte, miB)); err == nil; {
		_, err = f.Write(make([]byte, miB))
	}
	check(t, errors.Join(f.Truncate(0), f.Close()))
	check(t, os.WriteFile(ballast, make([]byte, 14*miB), 0o600))
	img := storetest.NewImage("full for a while", storetest.Solid(1, 8*miB))
	s := open(t, store.Config{Dir: dir, Keep: true})
	i := openImage(t, s, img, storetest.NewSource("good", img))
	sameAll(t, i, img.Plain, 128*kiB)
	if s.Stats().KeepFailures == 0 {
		t.Error("the disk did not get full")
	}
	check(t, os.Remove(ballast))
	check(t, i.Fill(context.Background()))
	if !i.Complete() {
		t.Errorf("%d of %d bytes present", i.Present(), i.Size())
	}
	sameAll(t, i, img.Plain, 128*kiB)
}

func TestRestart(t *testing.T) {
	img := storetest.NewImage("restart", storetest.Units(1, 6*miB), storetest.Files(2, 4*miB, 5, 600_000))
	eachMode(t, func(t *testing.T, cfg store.Config) {
		s := open(t, cfg)
		i := openImage(t, s, img, storetest.NewSource("good", img))
		same(t, i, img.Plain, firstChunk, 3*miB)
		present := i.Present()
		check(t, s.Close())

		s = open(t, cfg)
		if list := s.Images(); len(list) != 1 || list[0].Manifest != img.Index.Manifest || list[0].Size != i.Size() || list[0].Open {
			t.Fatalf("images %+v", list)
		}
		src := storetest.NewSource("second", img)
		i, err := s.LoadImage(context.Background(), img.Index.Manifest, []store.Source{src})
		check(t, err)
		if i.Present() != present {
			t.Errorf("%d bytes present after the restart, %d before", i.Present(), present)
		}
		same(t, i, img.Plain, 0, 3*miB)
		if cfg.Keep && len(src.Requests()) > 0 {
			t.Errorf("fetched again: %v", src.Requests())
		}
		sameAll(t, i, img.Plain, 128*kiB)
		check(t, i.Close())
	})
}

func TestLoadUnknown(t *testing.T) {
	s := open(t, store.Config{Dir: t.TempDir()})
	if _, err := s.LoadImage(context.Background(), storetest.NewImage("x").Index.Manifest, nil); !errdefs.IsNotFound(err) {
		t.Errorf("load: %v", err)
	}
}

// Damage on disk costs a fetch, never wrong bytes.
func TestDamage(t *testing.T) {
	img := storetest.NewImage("damage", storetest.Units(1, 4*miB))
	id := img.Index.Segments[0].ID.Encoded()
	manifest := img.Index.Manifest.Encoded()
	short := func(name string) error { return os.Truncate(name, 9) }
	flip := func(name string) error {
		b, err := os.ReadFile(name)
		if err == nil {
			b[len(b)/2] ^= 1
			err = os.WriteFile(name, b, 0o600)
		}
		return err
	}
	cases := []struct {
		name, file string
		harm       func(string) error
		loads      bool
	}{
		{"bits short", "segments/" + id + ".bits", short, true},
		{"bits flipped", "segments/" + id + ".bits", flip, true},
		{"bits empty", "segments/" + id + ".bits", func(n string) error { return os.Truncate(n, 0) }, true},
		{"bits gone", "segments/" + id + ".bits", os.Remove, true},
		{"data gone", "segments/" + id + ".data", os.Remove, true},
		{"data short", "segments/" + id + ".data", short, true},
		{"data of something else", "segments/" + id + ".bits", func(n string) error {
			b := bytes.Repeat([]byte{0xff}, int(4*miB))
			return errors.Join(os.Remove(n), os.WriteFile(strings.TrimSuffix(n, ".bits")+".data", b, 0o600))
		}, true},
		{"table short", "segments/" + id + ".table", short, false},
		{"table flipped", "segments/" + id + ".table", flip, false},
		{"table gone", "segments/" + id + ".table", os.Remove, false},
		{"bootstrap flipped", "images/" + manifest + ".boot", flip, false},
		{"record short", "images/" + manifest + ".json", short, false},
		{"record gone", "images/" + manifest + ".json", os.Remove, false},
	}
	for _, c := range cases {
		t.Run(c.name, func(t *testing.T) {
			cfg := store.Config{Dir: t.TempDir(), Keep: true}
			s := open(t, cfg)
			check(t, openImage(t, s, img, storetest.NewSource("good", img)).Fill(context.Background()))
			check(t, s.Close())
			check(t, c.harm(filepath.Join(cfg.Dir, c.file)))
			s = open(t, cfg)
			src := storetest.NewSource("good", img)
			i, err := s.LoadImage(context.Background(), img.Index.Manifest, []store.Source{src})
			if c.loads != (err == nil) || err != nil && !errdefs.IsNotFound(err) {
				t.Fatalf("load: %v", err)
			}
			if err != nil {
				i = openImage(t, s, img, src)
			}
			sameAll(t, i, img.Plain, 128*kiB)
			check(t, i.Close())
			i, err = s.LoadImage(context.Background(), img.Index.Manifest, []store.Source{src})
			check(t, err)
			check(t, i.Close())
		})
	}
}

// A data file that loses bytes while it is open gives an error, not zeros.
func TestDataVanishes(t *testing.T) {
	cfg := store.Config{Dir: t.TempDir(), Keep: true}
	img := storetest.NewImage("vanish", storetest.Solid(1, miB))
	i := openImage(t, open(t, cfg), img, storetest.NewSource("good", img))
	check(t, i.Fill(context.Background()))
	check(t, os.Truncate(filepath.Join(cfg.Dir, "segments", img.Index.Segments[0].ID.Encoded()+".data"), 4096))
	if _, err := i.ReadAt(context.Background(), make([]byte, 4096), firstChunk+64*kiB); !errdefs.IsDataLoss(err) {
		t.Errorf("read: %v", err)
	}
}

func TestLocked(t *testing.T) {
	cfg := store.Config{Dir: t.TempDir()}
	s := open(t, cfg)
	if _, err := store.Open(cfg); !errdefs.IsFailedPrecondition(err) {
		t.Errorf("second open: %v", err)
	}
	check(t, s.Close())
	open(t, cfg)
}

const childDir = "TATAMI_TEST_STORE_DIR"

// killImage is what the process of TestKilled reads.
func killImage() *storetest.Image {
	a, b := storetest.Solid(1, 16*miB), storetest.Files(2, 4*miB, 70_000, 5*miB)
	return storetest.NewImage("killed", a, b, storetest.Cut(64*kiB, a.Plain[4*miB:8*miB], a.Plain[:2*miB]))
}

// A process that is killed while it reads leaves a directory that the next one
// uses: right bytes, and what had been flushed is there.
func TestKilled(t *testing.T) {
	if dir := os.Getenv(childDir); dir != "" {
		readUntilKilled(dir)
	}
	exe, err := os.Executable()
	check(t, err)
	img, dir := killImage(), t.TempDir()
	for round := range 6 {
		cmd := exec.CommandContext(t.Context(), exe, "-test.run=^TestKilled$")
		cmd.Env = append(os.Environ(), childDir+"="+dir)
		cmd.Stderr = os.Stderr
		out, err := cmd.StdoutPipe()
		check(t, err)
		check(t, cmd.Start())
		lines := bufio.NewScanner(out)
		for n := 0; n < 10*(round+1) && lines.Scan(); n++ {
			_ = n
		}
		check(t, cmd.Process.Kill())
		_ = cmd.Wait() // killed

		s := open(t, store.Config{Dir: dir, Keep: true})
		i, err := s.LoadImage(context.Background(), img.Index.Manifest, []store.Source{storetest.NewSource("good", img)})
		check(t, err)
		if i.Present() <= firstChunk {
			t.Errorf("round %d: nothing of what was flushed is present", round)
		}
		check(t, checkPresent(i, img))
		check(t, s.Close())
	}
}

// readUntilKilled reads and flushes and says so on stdout.
func readUntilKilled(dir string) {
	img := killImage()
	s, err := store.Open(store.Config{Dir: dir, Keep: true})
	if err != nil {
		panic(err)
	}
	i, err := s.OpenImage(context.Background(), img.Index, []store.Source{storetest.NewSource("good", img)})
	if err != nil {
		panic(err)
	}
	p := make([]byte, 4096)
	for off := int64(0); ; off += 333_333 {
		if _, err := i.ReadAt(context.Background(), p, firstChunk+off%(26*miB)); err != nil {
			panic(err)
		}
		s.Flush()
		fmt.Println(off)
	}
}

// checkPresent reads the image; bytes that the store believes to have come from
// disk, wrong ones included.
func checkPresent(i *store.Image, img *storetest.Image) error {
	p := make([]byte, 64*kiB)
	for off := int64(0); off < i.Size(); off += 64 * kiB {
		n, _ := i.ReadAt(context.Background(), p, off)
		if string(p[:n]) != string(img.Plain[off:off+int64(n)]) {
			return fmt.Errorf("wrong bytes at %d", off)
		}
	}
	return nil
}

// The machine loses power: what the block device had at that moment is mounted
// again. Bits never speak of data that did not make it.
func TestPowerLoss(t *testing.T) {
	img := storetest.NewImage("power", storetest.Solid(1, 8*miB), storetest.Units(2, 4*miB))
	ingested := storetest.Solid(3, 4*miB)
	for _, flushed := range []bool{false, true} {
		t.Run(fmt.Sprintf("flushed %v", flushed), func(t *testing.T) {
			disk := filesystem(t, 64*miB)
			dir := mount(t, loopDevice(t, disk), "ext4", "", 0)
			s := open(t, store.Config{Dir: dir, Keep: true})
			i := openImage(t, s, img, storetest.NewSource("good", img))
			same(t, i, img.Plain, firstChunk, 2*miB)
			check(t, syncFS(dir)) // the names of files, as a few seconds bring
			s.Flush()
			same(t, i, img.Plain, firstChunk, 5*miB)
			in, err := s.Ingest(context.Background())
			check(t, err)
			_, err = in.Write(ingested.Plain)
			check(t, err)
			id, err := in.Commit(ingested.Table)
			check(t, err)
			if flushed {
				s.Flush()
			}
			after := copyFile(t, disk)
			check(t, s.Close())

			dir = mount(t, loopDevice(t, after), "ext4", "", 0)
			s = open(t, store.Config{Dir: dir, Keep: true})
			src := storetest.NewSource("after", img)
			i, err = s.LoadImage(context.Background(), img.Index.Manifest, []store.Source{src})
			check(t, err)
			if want := map[bool]int64{false: 2 * miB, true: 5 * miB}[flushed]; i.Present() < want {
				t.Errorf("%d bytes present, %d were flushed", i.Present(), want)
			}
			sameAll(t, i, img.Plain, 128*kiB)
			two := storetest.NewImage("two", ingested)
			seg := two.Index.Segments[0]
			if seg.ID != id {
				t.Fatalf("ingested %s, want %s", id, seg.ID)
			}
			g, err := s.OpenSegment(context.Background(), &seg, []store.Source{storetest.NewSource("after", two)})
			check(t, err)
			sameAll(t, g, ingested.Plain, 128*kiB)
			check(t, s.Close())
		})
	}
}

func syncFS(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
}

// filesystem makes a file with an empty ext4 of n bytes.
func filesystem(t *testing.T, n int64) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("needs root: mounts a filesystem")
	}
	name := filepath.Join(t.TempDir(), "disk")
	check(t, os.WriteFile(name, nil, 0o600))
	check(t, os.Truncate(name, n))
	if out, err := exec.CommandContext(t.Context(), "mkfs.ext4", "-q", name).CombinedOutput(); err != nil {
		t.Fatalf("mkfs.ext4: %v: %s", err, out)
	}
	return name
}

func loopDevice(t *testing.T, name string) string {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "losetup", "--find", "--show", name).Output()
	if err != nil {
		t.Fatalf("losetup: %v", err)
	}
	dev := string(out[:len(out)-1])
	t.Cleanup(func() { check(t, exec.CommandContext(context.Background(), "losetup", "--detach", dev).Run()) })
	return dev
}

func copyFile(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(name)
	check(t, err)
	out := filepath.Join(t.TempDir(), "copy")
	check(t, os.WriteFile(out, b, 0o600))
	return out
}
