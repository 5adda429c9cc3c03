package snapshotter

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
)

// all calls fn a hundred times at once and returns the errors.
func all(fn func(i int) error) []error {
	errs := make([]error, 100)
	var wg sync.WaitGroup
	for i := range errs {
		wg.Go(func() { errs[i] = fn(i) })
	}
	wg.Wait()
	return errs
}

func TestConcurrent(t *testing.T) {
	g := newRig(t, Share)
	var layers []tree
	for i := range 100 {
		layers = append(layers, tree{fmt.Sprint(i): "x"})
	}
	manifest := g.images.publish(t, "", layers...)
	chains := chainIDs(must(g.images.image(manifest))(t).DiffIDs)
	parent := func(i int) string {
		if i == 0 {
			return ""
		}
		return chains[i-1]
	}
	prepare := func(i, n int) error {
		_, err := g.Prepare(t.Context(), fmt.Sprintf("k8s.io/%d/extract-%d %s", i, i, chains[n]), parent(n),
			snapshots.WithLabels(layerLabels(ref, manifest, chains[n])))
		return err
	}
	// The same layer for all: no transaction is open while all wait for the node.
	var entered sync.WaitGroup
	entered.Add(100)
	g.images.before = func(ctx context.Context) error {
		entered.Done()
		entered.Wait()
		return nil
	}
	for i, err := range all(func(i int) error { return prepare(i, 0) }) {
		if !errdefs.IsAlreadyExists(err) {
			t.Errorf("%d: %v", i, err)
		}
	}
	g.images.before = func(context.Context) error { return nil }
	// One layer after the other, then a hundred containers, and Cleanup meanwhile.
	for n := range chains {
		if err := prepare(n, n); !errdefs.IsAlreadyExists(err) {
			t.Fatal(err)
		}
	}
	if n := g.images.asked.Load(); n != 199 {
		t.Errorf("the node was asked %d times", n)
	}
	stop := make(chan struct{})
	ended := make(chan error)
	go func() {
		for {
			select {
			case <-stop:
				ended <- nil
				return
			default:
				if err := g.Cleanup(context.Background()); err != nil {
					ended <- err
					return
				}
			}
		}
	}()
	top := chains[len(chains)-1]
	keys := make([]string, 100)
	for i, err := range all(func(i int) error {
		keys[i] = fmt.Sprint("c", i)
		_, err := g.Prepare(t.Context(), keys[i], top)
		return err
	}) {
		if err != nil {
			t.Errorf("%d: %v", i, err)
		}
	}
	won := 0
	for i, err := range all(func(int) error { _, err := g.Prepare(t.Context(), "same", top); return err }) {
		if err == nil {
			won++
		} else if !errdefs.IsAlreadyExists(err) {
			t.Errorf("%d: %v", i, err)
		}
	}
	if won != 1 {
		t.Errorf("%d callers got the same snapshot", won)
	}
	for i, err := range all(func(i int) error { _, err := g.Mounts(t.Context(), keys[i]); return err }) {
		if err != nil {
			t.Errorf("%d: %v", i, err)
		}
	}
	close(stop)
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if len(g.dirs(t)) != 101 || len(g.holders(t)) != 101 {
		t.Errorf("%d directories, %d holders", len(g.dirs(t)), len(g.holders(t)))
	}
	for i, err := range all(func(i int) error { return g.Remove(t.Context(), keys[i]) }) {
		if err != nil {
			t.Errorf("%d: %v", i, err)
		}
	}
	g.removeAll(t, append([]string{"same"}, reversed(chains)...)...)
}

// Remove while others ask for the mounts leaves no holder.
func TestRemoveWhileMounts(t *testing.T) {
	g := newRig(t, Share)
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}))
	for range 10 {
		must(g.Prepare(t.Context(), "c", p.top()))(t)
		errs := all(func(i int) error {
			if i == 50 {
				return g.Remove(t.Context(), "c")
			}
			_, err := g.Mounts(t.Context(), "c")
			return err
		})
		for i, err := range errs {
			if err != nil && !errdefs.IsNotFound(err) {
				t.Errorf("%d: %v", i, err)
			}
		}
		if got := g.holders(t); len(got) != 0 {
			t.Fatalf("holders %v", got)
		}
	}
	g.removeAll(t, p.top())
}

// A record whose directory somebody removed goes, and what it held; what others
// lie on stays.
func TestLost(t *testing.T) {
	needRoot(t)
	g := newRig(t, Share)
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}))
	q := g.pull(t, "k8s.io", "b:1", g.images.publish(t, "no", tree{"b": "1"}))
	must(g.Prepare(t.Context(), "c1", p.top()))(t)
	must(g.Prepare(t.Context(), "c2", q.top()))(t)
	dirs := g.dirs(t)
	for _, d := range dirs[:2] {
		if err := os.RemoveAll(filepath.Join(g.cfg.Root, "snapshots", d)); err != nil {
			t.Fatal(err)
		}
	}
	g.restart(t)
	entries := must(g.List(t.Context()))(t)
	var keys []string
	for _, e := range entries {
		keys = append(keys, e.Key)
	}
	slices.Sort(keys)
	want := []string{"c2", q.top(), p.top()}
	slices.Sort(want)
	if !slices.Equal(keys, want) || len(g.holders(t)) != 0 {
		t.Errorf("%v, want %v; holders %v", keys, want, g.holders(t))
	}
}

// Two processes do not share the metadata, and the second says why.
func TestLocked(t *testing.T) {
	g := newRig(t, Full)
	must(g.Prepare(t.Context(), "c", ""))(t)
	g.cfg.lockWait = 100 * time.Millisecond
	if _, err := Open(t.Context(), g.cfg); !errdefs.IsFailedPrecondition(err) {
		t.Error(err)
	}
}
