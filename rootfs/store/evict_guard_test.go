package store_test

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/tatami-containers/tatami/rootfs/store"
	"github.com/tatami-containers/tatami/rootfs/store/storetest"
)

// Whoever opens an image while its bytes are being given up, and fetches them again,
// does not lose them to the hole that is made then.
func TestFetchDuringEviction(t *testing.T) {
	cfg := store.Config{Dir: memoryDir(t), Keep: true}
	s := openSmall(t, cfg)
	img := solid(1, 2*miB)
	src := storetest.NewSource("good", img)
	useAll(t, s, img, false, src)
	var once sync.Once
	read := make(chan *store.Image, 1)
	s.SetSync(func(f *os.File) error { // the chunks are absent by now, their bytes still in the file
		once.Do(func() {
			done := make(chan struct{})
			go func() {
				defer close(done)
				i, err := s.OpenImage(context.Background(), img.Index, []store.Source{src})
				if err != nil {
					t.Error(err)
					close(read)
					return
				}
				sameAll(t, i, img.Plain, 100*kiB)
				read <- i
			}()
			select {
			case <-done:
			case <-time.After(200 * time.Millisecond): // it waits for this eviction
			}
		})
		return f.Sync()
	})
	s.Press()
	settle(t, s)
	i := within(t, read)
	if i == nil {
		t.Fatal("the image could not be opened")
	}
	if s.Space().Evicted == 0 {
		t.Error("nothing was given up")
	}
	if !i.Complete() {
		t.Errorf("%d of %d bytes were kept", i.Present(), i.Size())
	}
	sameAll(t, i, img.Plain, 100*kiB)
	check(t, i.Close())
}

// within waits for an image, but not for ever.
func within(t *testing.T, opened <-chan *store.Image) *store.Image {
	t.Helper()
	select {
	case i := <-opened:
		return i
	case <-time.After(30 * time.Second):
		t.Fatal("nobody has opened the image")
		return nil
	}
}

// At every moment of an eviction, what a crash would leave says nothing wrong: the
// bits on disk speak of bytes that are in the file.
func TestCrashDuringEviction(t *testing.T) {
	cfg := store.Config{Dir: memoryDir(t), Keep: true}
	s := openSmall(t, cfg)
	img := solid(1, 2*miB)
	src := storetest.NewSource("good", img)
	useAll(t, s, img, false, src)
	before, after := memoryDir(t), memoryDir(t)
	var once sync.Once
	s.SetSync(func(f *os.File) error {
		once.Do(func() { copyDir(t, cfg.Dir, before) })
		return f.Sync()
	})
	s.Press()
	settle(t, s)
	if s.Space().Evicted == 0 {
		t.Error("nothing was given up")
	}
	copyDir(t, cfg.Dir, after)
	for _, dir := range []string{before, after} {
		s := openSmall(t, store.Config{Dir: dir, Keep: true})
		useAll(t, s, img, false, src)
	}
}

// copyDir makes a copy of a store as it is on the disk.
func copyDir(t *testing.T, from, to string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "cp", "-a", from+"/.", to).CombinedOutput(); err != nil {
		t.Errorf("copy %s: %v: %s", from, err, out)
	}
}

// hasFile says whether an image has a complete file.
func hasFile(t *testing.T, cfg store.Config, img *storetest.Image) bool {
	t.Helper()
	_, err := os.Stat(filepath.Join(cfg.Dir, "images", img.Index.Manifest.Encoded()+".erofs"))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Error(err)
	}
	return err == nil
}

// An image that is removed while it makes way leaves nothing.
func TestRemoveDuringEviction(t *testing.T) {
	cfg := store.Config{Dir: memoryDir(t), Keep: true}
	s := openSmall(t, cfg)
	img := solid(1, 2*miB)
	useAll(t, s, img, false, storetest.NewSource("good", img))
	var once sync.Once
	s.SetSync(func(f *os.File) error {
		once.Do(func() { check(t, s.Remove(img.Index.Manifest)) })
		return f.Sync()
	})
	s.Press()
	settle(t, s)
	left, err := os.ReadDir(filepath.Join(cfg.Dir, "segments"))
	check(t, err)
	if n := s.Space().Used; n != 0 || len(left) > 0 {
		t.Errorf("%d bytes are counted, files %v are left", n, left)
	}
}

// What a crash has left in a segment's file, of which no bit speaks, is counted and
// makes way, also when the image was opened since.
func TestLeftByCrash(t *testing.T) {
	cfg := store.Config{Dir: memoryDir(t), Keep: true}
	s := openSmall(t, cfg)
	img := solid(1, 4*miB)
	src := storetest.NewSource("good", img)
	i := openImage(t, s, img, src)
	same(t, i, img.Plain, firstChunk, 100*kiB)
	s.Flush()
	before := memoryDir(t)
	copyDir(t, cfg.Dir, before)
	sameAll(t, i, img.Plain, 300*kiB)
	check(t, i.Close())
	check(t, s.Close())
	for _, suffix := range []string{".bits", ".use"} { // as they were before the rest came
		name := filepath.Join("segments", img.Index.Segments[0].ID.Encoded()+suffix)
		data, err := os.ReadFile(filepath.Join(before, name))
		check(t, err)
		check(t, os.WriteFile(filepath.Join(cfg.Dir, name), data, 0o600))
	}
	s = openSmall(t, cfg)
	i = openImage(t, s, img, src)
	same(t, i, img.Plain, firstChunk, 100*kiB)
	check(t, i.Close())
	if got, want := s.Space().Used, disk(t, cfg); got != want || got < 4*miB {
		t.Errorf("%d bytes are counted, the disk has %d", got, want)
	}
	for range 20 {
		s.Press()
		settle(t, s)
	}
	if got, want := s.Space().Used, disk(t, cfg); got != 0 || want != 0 {
		t.Errorf("%d bytes are counted, the disk has %d, all might have gone", got, want)
	}
}

// An image that is opened after it was chosen to make way, and before its turn comes,
// loses nothing; nor does its complete file.
func TestOpenedBeforeItsTurn(t *testing.T) {
	for _, whole := range []bool{false, true} {
		cfg := store.Config{Dir: memoryDir(t), Keep: true}
		s := openSmall(t, cfg)
		first, second := solid(1, 2*miB), solid(2, 2*miB)
		src := storetest.NewSource("good", first, second)
		useAll(t, s, first, true, src) // goes first
		i := openImage(t, s, second, src)
		sameAll(t, i, second.Plain, 300*kiB)
		if whole {
			_, err := i.Materialize(context.Background())
			check(t, err)
		}
		check(t, i.Close())
		check(t, s.Close())
		cfg.Quota, cfg.High, cfg.Low = 100*miB, 1, 1 // all is to go
		var once sync.Once
		opened := make(chan *store.Image, 1)
		s, err := store.OpenSyncing(cfg, 512*kiB, func(s *store.Store, f *os.File) error {
			once.Do(func() {
				for _, img := range []*storetest.Image{first, second} {
					if strings.Contains(f.Name(), img.Index.Segments[0].ID.Encoded()) {
						continue
					}
					i, err := s.LoadImage(context.Background(), img.Index.Manifest, nil)
					if err != nil {
						t.Error(err)
					}
					opened <- i
				}
			})
			return f.Sync()
		})
		check(t, err)
		i = within(t, opened)
		settle(t, s)
		if whole && i.Manifest() == second.Index.Manifest && !hasFile(t, cfg, second) {
			t.Error("the complete file of an open image is gone")
		}
		if !i.Complete() {
			t.Errorf("complete file %v: %d of %d bytes are left", whole, i.Present(), i.Size())
		}
		check(t, i.Close())
		settle(t, s)
		if n := s.Space().Used; n > 0 {
			t.Errorf("%d bytes are left", n)
		}
		check(t, s.Close())
	}
}

// The complete file of an image stays while a pinned one is linked to what is in it.
func TestPinnedLinksIntoFile(t *testing.T) {
	cfg := store.Config{Dir: memoryDir(t), Keep: true, Quota: 100 * miB, High: 1, Low: 1} // all is to go
	a, b := versions()
	s := openSmall(t, cfg)
	s.SetPinned(a.Index.Manifest, b.Index.Manifest)
	src := storetest.NewSource("good", a, b)
	i := openImage(t, s, a, src)
	_, err := i.Materialize(context.Background())
	check(t, err)
	check(t, i.Close())
	i = openImage(t, s, b, src)
	fill(t, i)
	check(t, i.Close())
	if s.Stats().SharedChunks == 0 {
		t.Fatal("nothing is linked")
	}
	s.SetPinned(b.Index.Manifest)
	settle(t, s)
	wantPresent(t, s, b, all(b))
	s.SetPinned()
	settle(t, s)
	if n := s.Space().Used; n > 0 || hasFile(t, cfg, a) {
		t.Errorf("%d bytes are left", n)
	}
}
