package daemon

import (
	"fmt"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	api "github.com/tatami-containers/tatami/protocols/imageservice/v1"
	"github.com/tatami-containers/tatami/tests/registrytest"
)

// TestADeadWorkerIsAPause kills workers while readers wait for bytes that come
// slowly: no read fails, no byte is wrong, mounts and calls go on.
func TestADeadWorkerIsAPause(t *testing.T) {
	for _, path := range []string{"file", "loop"} {
		t.Run(path, func(t *testing.T) {
			n := newNode(t)
			img := n.pushSample("sample")
			for _, id := range []string{"c1", "c2", "full"} {
				n.add(id, sampleRef, img, "host")
			}
			g := startGuest(t, n, "--mount-path", path)
			root := g.mustPull("c1", sampleRef)
			if _, err := g.Mount(t.Context(), &api.MountRequest{Id: "full", Target: g.path("full"), Mode: api.Mode_MODE_FULL}); err != nil {
				t.Fatal(err)
			}
			n.reg.Fault("/segments/", 0, registrytest.Delay(20*time.Millisecond), registrytest.Slow(4<<20))
			load := startLoad(root)
			defer load.stop()
			const kills = 3
			for range kills {
				load.await(20) // so that each worker was read from
				if err := unix.Kill(g.workerPID(), unix.SIGKILL); err != nil {
					t.Fatal(err)
				}
			}
			load.await(20)
			// The same on demand: an upgrade.
			old := g.workerPID()
			if err := g.cmd.Process.Signal(unix.SIGHUP); err != nil {
				t.Fatal(err)
			}
			for g.workerPID() == old {
				time.Sleep(time.Millisecond)
			}
			load.await(20)
			for _, err := range load.stop() {
				t.Error(err)
			}
			g.connect()
			if s := g.stats(); s.Restarts != kills+1 || s.VerifyFailures != 0 {
				t.Errorf("restarts %d, wrong chunks %d", s.Restarts, s.VerifyFailures)
			}
			list, err := g.List(t.Context(), &api.ListRequest{})
			if err != nil || len(list.Mounts) != 2 {
				t.Errorf("list %v, %v", list, err)
			}
			// The agent's one connection is as good as before.
			again := g.mustPull("c1", sampleRef)
			second := g.mustPull("c2", sampleRef)
			for _, r := range []string{again, second} {
				if got, err := readAll(filepath.Join(r, samplePath(5))); err != nil || got != sampleContent(5) {
					t.Errorf("%s: %d bytes, %v", r, len(got), err)
				}
			}
			for _, id := range []string{"c1", "full"} {
				if _, err := g.Unmount(t.Context(), &api.UnmountRequest{Id: id}); err != nil {
					t.Errorf("unmount %s: %v", id, err)
				}
			}
		})
	}
}

// TestAPullGoesOnWithTheNextWorker kills the worker in the middle of PullImage.
func TestAPullGoesOnWithTheNextWorker(t *testing.T) {
	n := newNode(t)
	n.add("c1", sampleRef, n.pushSample("sample"), "host")
	g := startGuest(t, n)
	n.reg.Reset()
	n.reg.Fault("/manifests/", 1, registrytest.Stall(10, registrytest.Forever))
	n.reg.Fault("/referrers/", 1, registrytest.Stall(10, registrytest.Forever))
	pulled := make(chan error, 1)
	go func() {
		_, err := g.pull("c1", sampleRef)
		pulled <- err
	}()
	for len(n.reg.Requests("/manifests/")) == 0 {
		time.Sleep(5 * time.Millisecond)
	}
	if err := unix.Kill(g.workerPID(), unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-pulled; err != nil {
		t.Error(err)
	}
	g.connect() // the test's own connection was to the dead one
}

// load reads the sample over and over, past the page cache.
type load struct {
	readers sync.WaitGroup
	ended   chan struct{}
	once    sync.Once
	reads   atomic.Int64

	mu   sync.Mutex
	errs []error
}

func startLoad(root string) *load {
	l := &load{ended: make(chan struct{})}
	var want []string
	for i := range sampleFiles {
		want = append(want, sampleContent(i))
	}
	for r := range 4 {
		l.readers.Go(func() {
			for i := r; ; i++ {
				select {
				case <-l.ended:
					return
				default:
				}
				l.read(root, i%sampleFiles, want)
			}
		})
	}
	l.readers.Go(func() {
		for {
			select {
			case <-l.ended:
				return
			case <-time.After(30 * time.Millisecond):
				// Best effort: with pages left in memory the load is only lighter.
				_ = os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0)
			}
		}
	})
	return l
}

func (l *load) read(root string, i int, want []string) {
	got, err := readAll(filepath.Join(root, samplePath(i)))
	if err == nil && got != want[i] {
		err = fmt.Errorf("%s: %d wrong bytes", samplePath(i), len(got))
	}
	if err != nil {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.errs = append(l.errs, err)
	}
	l.reads.Add(1)
}

// await returns when n more files were read.
func (l *load) await(n int64) {
	for until := l.reads.Load() + n; l.reads.Load() < until; {
		time.Sleep(time.Millisecond)
	}
}

func (l *load) stop() []error {
	l.once.Do(func() { close(l.ended) })
	l.readers.Wait()
	return l.errs
}

// TestARegistryImageOutlivesTheWorker: without a node, the next worker needs
// the index of each layer, which only the guest has.
func TestARegistryImageOutlivesTheWorker(t *testing.T) {
	n := newNode(t)
	reg := registrytest.Start(t, registrytest.Options{})
	content := sampleContent(1)
	layer := registrytest.Must(registrytest.EStargz(registrytest.Must(registrytest.Tar(registrytest.File("a", 0o644, content)))))
	reg.PushImage("toc", "v1", registrytest.Image{Layers: []registrytest.Layer{layer}})
	g := startGuest(t, n, "--registry", "true", "--host-address", "", "--relay-address", "")
	root := g.mustPull("c1", reg.Host()+"/toc:v1")
	old := g.workerPID()
	if err := unix.Kill(old, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	dropCaches(t)
	if got, err := readAll(filepath.Join(root, "a")); err != nil || got != content {
		t.Errorf("%d bytes, %v", len(got), err)
	}
	g.connect()
}

// TestTheEndDoesNotWaitForAStalledSource: a reader waits for bytes that never
// come; the daemon ends all the same, the reader has an error, and the harness
// sees that nothing stays mounted.
func TestTheEndDoesNotWaitForAStalledSource(t *testing.T) {
	n := newNode(t)
	n.add("c1", sampleRef, n.pushSample("sample"), "host")
	read := make(chan error, 1)
	t.Run("guest", func(t *testing.T) {
		g := startGuest(t, n)
		root := g.mustPull("c1", sampleRef)
		n.reg.Reset()
		n.reg.Fault("/segments/", 0, registrytest.Stall(10, registrytest.Forever))
		go func() {
			_, err := readAll(filepath.Join(root, samplePath(7)))
			read <- err
		}()
		for len(n.reg.Requests("/segments/")) == 0 {
			time.Sleep(time.Millisecond)
		}
	})
	if err := <-read; err == nil {
		t.Error("the read succeeded")
	}
}
