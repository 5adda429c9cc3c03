package snapshotter

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/core/snapshots/storage"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
)

// Variables of the child process that kills itself.
const (
	crashDir  = "TATAMI_CRASH_DIR"
	crashStep = "TATAMI_CRASH_STEP" // "<operation>/<step>"
)

const unpackKey = "k8s.io/9/extract-9 sha256:0000000000000000000000000000000000000000000000000000000000000001"

// operation is a call that a crash may interrupt.
type operation struct {
	name          string
	adds, removes string // the keys of snapshots; "layer" is the image's
	steps         []string
	run           func(ctx context.Context, g *rig, layer string) error
}

// life is the operations in the order in which they happen to a node.
var life = []operation{
	{"pull", "layer", "", []string{"marking", "owned", "prepared", "remote inserted", "remote created"}, prepareLayer},
	{"run", "c", "", []string{"directory", "held", "upper file", "inserted", "renamed", "created"},
		func(ctx context.Context, g *rig, layer string) error {
			_, err := g.Prepare(ctx, "c", layer)
			return err
		}},
	{"unpack", unpackKey, "", []string{"directory", "held", "inserted", "renamed", "created"},
		func(ctx context.Context, g *rig, layer string) error {
			_, err := g.Prepare(ctx, unpackKey, layer)
			return err
		}},
	{"commit", "unpacked", unpackKey, []string{"committing", "committed"},
		func(ctx context.Context, g *rig, _ string) error { return g.Commit(ctx, "unpacked", unpackKey) }},
	{"stop", "", "c", []string{"removing", "removed", "put aside", "directory removed", "let go"},
		func(ctx context.Context, g *rig, _ string) error { return g.Remove(ctx, "c") }},
	{"discard", "", "unpacked", []string{"removing", "removed", "put aside", "directory removed"},
		func(ctx context.Context, g *rig, _ string) error { return g.Remove(ctx, "unpacked") }},
	{"forget", "", "layer", []string{"removing", "removed", "let go", "unmarked", "given up", "forgotten"},
		func(ctx context.Context, g *rig, layer string) error { return g.Remove(ctx, layer) }},
}

func prepareLayer(ctx context.Context, g *rig, layer string) error {
	opt := snapshots.WithLabels(layerLabels(ref, g.onlyImage(), layer))
	_, err := g.Prepare(ctx, "k8s.io/1/extract-1 "+layer, "", opt)
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	return errors.Join(err, errors.New("the layer is not served lazily"))
}

// onlyImage is the one that the test publishes.
func (g *rig) onlyImage() digest.Digest {
	names, _ := os.ReadDir(filepath.Join(g.images.root, "catalog"))
	return digest.NewDigestFromEncoded(digest.SHA256, names[0].Name())
}

func crashRig(t testing.TB, dir string, step func(string)) (g *rig, layer string) {
	t.Helper()
	g = &rig{images: newDirImages(t, filepath.Join(dir, "images"))}
	g.cfg = Config{Root: filepath.Join(dir, "root"), Name: "tatami", Mode: Block, UpperSize: 16 << 20,
		Fallback: []Mode{Full}, Images: g.images, step: step}
	if names, _ := os.ReadDir(filepath.Join(g.images.root, "catalog")); len(names) == 0 {
		g.images.publish(t, "", tree{"a": "1"})
	}
	g.open(t)
	return g, chainIDs(must(g.images.image(g.onlyImage()))(t).DiffIDs)[0]
}

// TestCrashChild is the process that dies. By itself it lives a whole life.
func TestCrashChild(t *testing.T) {
	needRoot(t)
	dir := os.Getenv(crashDir)
	if dir == "" {
		dir = t.TempDir()
	}
	name, fatal, _ := strings.Cut(os.Getenv(crashStep), "/")
	g, layer := crashRig(t, dir, func(step string) {
		if step == fatal {
			_ = syscall.Kill(os.Getpid(), syscall.SIGKILL)
			select {} // the signal is on its way
		}
	})
	defer g.Close()
	for _, o := range life {
		if name == "" || name == o.name {
			if err := o.run(t.Context(), g, layer); err != nil {
				t.Fatalf("%s: %v", o.name, err)
			}
		}
	}
	if name != "" {
		t.Fatalf("%s has no step %q", name, fatal)
	}
	g.checkEmpty(t)
}

// A process that dies at any step leaves what it had answered, and of the call
// under way all or nothing; what is left over goes at the next start.
func TestCrash(t *testing.T) {
	needRoot(t)
	for i, o := range life {
		for _, step := range o.steps {
			t.Run(o.name+"/"+step, func(t *testing.T) { crash(t, life[:i], o, step, life[i+1:]) })
		}
	}
}

func crash(t *testing.T, before []operation, o operation, step string, after []operation) {
	dir := t.TempDir()
	g, layer := crashRig(t, dir, nil)
	for _, b := range before {
		if err := b.run(t.Context(), g, layer); err != nil {
			t.Fatalf("%s: %v", b.name, err)
		}
	}
	undone := g.keys(t)
	if err := g.Close(); err != nil {
		t.Fatal(err)
	}
	die(t, dir, o.name+"/"+step)
	g, layer = crashRig(t, dir, nil)
	defer func() { g.Close() }()
	g.checkOrder(t)
	switch now := g.keys(t); {
	case slices.Equal(now, undone):
		if err := o.run(t.Context(), g, layer); err != nil {
			t.Fatalf("%s again: %v", o.name, err)
		}
	case !slices.Equal(now, change(undone, o, layer)):
		t.Fatalf("snapshots %q, before %q", now, undone)
	}
	g.checkOrder(t)
	for _, a := range after {
		if err := a.run(t.Context(), g, layer); err != nil {
			t.Fatalf("%s: %v", a.name, err)
		}
	}
	g.checkEmpty(t)
}

// change is what the operation makes of the keys.
func change(keys []string, o operation, layer string) []string {
	real := func(k string) string { return strings.Replace(k, "layer", layer, 1) }
	out := slices.DeleteFunc(slices.Clone(keys), func(k string) bool { return k == real(o.removes) })
	if o.adds != "" {
		out = append(out, real(o.adds))
	}
	slices.Sort(out)
	return out
}

// keys are those of all snapshots, sorted.
func (g *rig) keys(t testing.TB) (keys []string) {
	t.Helper()
	for _, e := range must(g.List(t.Context()))(t) {
		keys = append(keys, e.Key)
	}
	return keys
}

// checkOrder checks that directories, holders, marks and images are those of
// the records.
func (g *rig) checkOrder(t *testing.T) {
	t.Helper()
	var dirs, holders, images []string
	err := g.walk(t.Context(), func(ctx context.Context, info snapshots.Info, r record) (err error) {
		var id string
		err = g.view(ctx, func(ctx context.Context) error { id, _, _, err = storage.GetInfo(ctx, info.Name); return err })
		if remote := info.Kind == snapshots.KindCommitted && r.remote(); remote {
			images = append(images, r.chain.Manifest.Encoded())
		} else {
			dirs = append(dirs, id)
		}
		if r.holder != "" {
			holders = append(holders, r.holder)
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(dirs)
	slices.Sort(holders)
	var marks []string
	for _, m := range must(g.owners.list())(t) {
		marks = append(marks, m.Encoded())
	}
	for what, two := range map[string][2][]string{
		"directories": {g.dirs(t), dirs}, "holders": {g.holders(t), holders}, "images": {g.preparedImages(t), images}, "marks": {marks, images},
	} {
		if !slices.Equal(two[0], two[1]) {
			t.Errorf("%s %q, records have %q", what, two[0], two[1])
		}
	}
}

func die(t *testing.T, dir, step string) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run", "^TestCrashChild$")
	cmd.Env = append(os.Environ(), crashDir+"="+dir, crashStep+"="+step)
	out, err := cmd.CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
		t.Fatalf("%v: %s", err, out)
	}
}
