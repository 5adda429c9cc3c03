package snapshotter

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"strings"
	"testing"

	snapshotsapi "github.com/containerd/containerd/api/services/snapshots/v1"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// Our labels are neither seen nor changed from outside.
func TestOwnLabels(t *testing.T) {
	g := newRig(t, Guest)
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}))
	before := g.entry(t, p.top())
	visible := func(info snapshots.Info) {
		t.Helper()
		for k := range info.Labels {
			if strings.HasPrefix(k, ownPrefix) {
				t.Errorf("label %s is seen", k)
			}
		}
	}
	info := must(g.Stat(t.Context(), p.top()))(t)
	visible(info)
	if err := g.Walk(t.Context(), func(_ context.Context, i snapshots.Info) error { visible(i); return nil }); err != nil {
		t.Error(err)
	}
	for _, paths := range [][]string{nil, {"labels"}, {"labels.x"}} {
		info.Labels = map[string]string{"x": "y"}
		out := must(g.Update(t.Context(), info, paths...))(t)
		visible(out)
		if out.Labels["x"] != "y" {
			t.Errorf("%v: labels %v", paths, out.Labels)
		}
	}
	if after := g.entry(t, p.top()); after != before {
		t.Errorf("%+v, before %+v", after, before)
	}
	own := map[string]string{labelHolder: "../../x"}
	_, err1 := g.Update(t.Context(), snapshots.Info{Name: p.top(), Labels: own})
	_, err2 := g.Update(t.Context(), snapshots.Info{Name: p.top()}, "labels."+labelManifest)
	_, err3 := g.Prepare(t.Context(), "c", p.top(), snapshots.WithLabels(own))
	_, err4 := g.View(t.Context(), "c", p.top(), snapshots.WithLabels(own))
	_, err5 := g.Update(t.Context(), snapshots.Info{Name: p.top()}, "parent")
	for i, err := range []error{err1, err2, err3, err4, err5} {
		if !errdefs.IsInvalidArgument(err) {
			t.Errorf("%d: %v", i, err)
		}
	}
	if _, err := g.Update(t.Context(), snapshots.Info{Name: "none"}); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
}

// No name, parent or label becomes a path, and none is too large.
func TestHostile(t *testing.T) {
	g := newRig(t, Share)
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}))
	many := map[string]string{}
	for i := range maxLabels + 1 {
		many[fmt.Sprint(i)] = ""
	}
	long := strings.Repeat("k", maxKey+1)
	for what, call := range map[string]func() error{
		"no key":      func() error { _, err := g.Prepare(t.Context(), "", p.top()); return err },
		"long key":    func() error { _, err := g.Prepare(t.Context(), long, p.top()); return err },
		"zero byte":   func() error { _, err := g.View(t.Context(), "a\x00b", p.top()); return err },
		"not a text":  func() error { _, err := g.View(t.Context(), "\xff", p.top()); return err },
		"long parent": func() error { _, err := g.Prepare(t.Context(), "k", long); return err },
		"long name":   func() error { return g.Commit(t.Context(), long, "k") },
		"many labels": func() error { _, err := g.Prepare(t.Context(), "k", "", snapshots.WithLabels(many)); return err },
		"long label": func() error {
			_, err := g.Prepare(t.Context(), "k", "", snapshots.WithLabels(map[string]string{"a": long}))
			return err
		},
		"long target": func() error {
			_, err := g.Prepare(t.Context(), "k", "", snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: long}))
			return err
		},
		"reference with a zero byte": func() error {
			_, err := g.Prepare(t.Context(), "k", "", snapshots.WithLabels(layerLabels("a\x00b", p.manifest, "sha256:x")))
			return err
		},
		"empty label": func() error {
			_, err := g.Prepare(t.Context(), "k", "", snapshots.WithLabels(map[string]string{"": "x"}))
			return err
		},
		"parent is active": func() error {
			_, err := g.Prepare(t.Context(), "active", "")
			_, err2 := g.Prepare(t.Context(), "k", "active")
			return errors.Join(err, err2)
		},
	} {
		if err := call(); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if _, err := g.Prepare(t.Context(), "k", "../../../etc"); !errdefs.IsNotFound(err) {
		t.Error(err)
	}
	for _, key := range []string{"../../../../x", "/etc/passwd", "a/../b", "~", "1"} {
		if _, err := g.Prepare(t.Context(), key, p.top()); err != nil {
			t.Error(err)
		}
		if _, err := g.Prepare(t.Context(), key, p.top()); !errdefs.IsAlreadyExists(err) {
			t.Error(err)
		}
	}
	for _, d := range g.dirs(t) {
		if strings.Trim(d, "0123456789") != "" {
			t.Errorf("directory %q", d)
		}
	}
	if got := list(t, filepath.Dir(g.cfg.Root)); len(got) != 2 {
		t.Errorf("beside the root: %v", got)
	}
}

// containerd's garbage collection lists all snapshots, in messages of a hundred,
// and no image may make one larger than gRPC takes: nothing would ever be removed
// again.
func TestListOfLargeLabels(t *testing.T) {
	g := newRig(t, Full)
	client := listen(t, func(s *grpc.Server) { g.Register(s) })
	large := map[string]string{}
	for i := range (maxLabelBytes - 1) / maxKey {
		large[fmt.Sprintf("%04d", i)] = strings.Repeat("v", 4000)
	}
	for i := range 101 {
		if _, err := client.View(t.Context(), fmt.Sprint(i), "", snapshots.WithLabels(large)); err != nil {
			t.Fatal(err)
		}
	}
	n := 0
	if err := client.Walk(t.Context(), func(context.Context, snapshots.Info) error { n++; return nil }); err != nil || n != 101 {
		t.Errorf("%d snapshots: %v", n, err)
	}
	larger := maps.Clone(large)
	for i := range 8 {
		larger[fmt.Sprintf("more%d", i)] = strings.Repeat("v", 4000)
	}
	if _, err := client.View(t.Context(), "k", "", snapshots.WithLabels(larger)); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	info := snapshots.Info{Name: "0", Labels: larger}
	maps.DeleteFunc(info.Labels, func(k, _ string) bool { return !strings.HasPrefix(k, "more") })
	var paths []string
	for k := range info.Labels {
		paths = append(paths, "labels."+k)
	}
	if _, err := client.Update(t.Context(), info, paths...); !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
	if len(must(client.Stat(t.Context(), "0"))(t).Labels) != len(large) {
		t.Error("labels of a refused update stay")
	}
}

func TestConfig(t *testing.T) {
	good := Config{Root: t.TempDir(), Name: "a", Mode: Share, Images: newDirImages(t, t.TempDir())}
	for reason, change := range map[string]func(*Config){
		"a name is":       func(c *Config) { c.Name = "a.b" },
		"root \"x\"":      func(c *Config) { c.Root = "x" },
		"root \"/a,b\"":   func(c *Config) { c.Root = "/a,b" },
		"root \"/a/..\"":  func(c *Config) { c.Root = "/a/.." },
		"no images":       func(c *Config) { c.Images = nil },
		"mode \"\"":       func(c *Config) { c.Mode = "" },
		"mode \"x\"":      func(c *Config) { c.Fallback = []Mode{"x"} },
		"mode \"y\"":      func(c *Config) { c.Allow = []Mode{"y"} },
		"upper_size":      func(c *Config) { c.UpperSize = 1 },
		"of -1 bytes":     func(c *Config) { c.UpperSize = -1 },
		"mount_helper \"": func(c *Config) { c.Mode = Guest },
		"mount_helper":    func(c *Config) { c.Fallback, c.MountHelper = []Mode{Guest}, "/bin/mount" },
	} {
		c := good
		change(&c)
		if _, err := Open(t.Context(), c); !errdefs.IsInvalidArgument(err) || !strings.Contains(err.Error(), reason) {
			t.Errorf("%v, want %s", err, reason)
		}
	}
}

func TestUpperSize(t *testing.T) {
	needRoot(t)
	g := newRig(t, Block, func(c *Config) { c.UpperSize = 64 << 20 })
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}))
	prepare := func(key, size string) error {
		_, err := g.Prepare(t.Context(), key, p.top(), snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotMaxSize: size}))
		return err
	}
	for _, bad := range []string{"", "x", "-1", "0", "67108865", "9223372036854775808", strings.Repeat("9", 4000)} {
		if err := prepare("bad", bad); !errdefs.IsInvalidArgument(err) {
			t.Errorf("%.20q: %v", bad, err)
		}
	}
	if err := prepare("c", "16777216"); err != nil {
		t.Fatal(err)
	}
	id := must(g.layoutOf(t.Context(), "c"))(t).id
	st := must(os.Stat(g.path(id, upperFile)))(t)
	usage := must(g.Usage(t.Context(), "c"))(t)
	if st.Size() != 16<<20 || usage.Size < 4096 || usage.Size > 2<<20 {
		t.Errorf("%d bytes, %d on disk", st.Size(), usage.Size)
	}
	if err := g.Commit(t.Context(), "n", "c"); !errdefs.IsNotImplemented(err) {
		t.Errorf("commit: %v", err)
	}
	g.removeAll(t, "c", p.top())
	if err := makeExt4(t.Context(), g.mkfs, "/proc/none"); err == nil || !strings.Contains(err.Error(), "/proc/none") {
		t.Errorf("mkfs: %v", err)
	}
}

func TestLookup(t *testing.T) {
	g := newRig(t, Share)
	p := g.pull(t, "k8s.io", ref, g.images.publish(t, "", tree{"a": "1"}))
	q := g.pull(t, "k8s.io", "other:1", g.images.publish(t, "", tree{"b": "1"}))
	for key, parent := range map[string]string{
		"k8s.io/1/c1": p.top(), "moby/2/c1": p.top(), "c2": q.top(), "k8s.io/3/c3": p.top(), "moby/4/c3": q.top(), "k8s.io/5/x/c4": p.top(),
	} {
		must(g.Prepare(t.Context(), key, parent))(t)
	}
	for container, want := range map[string]func(error) bool{
		"c1": func(err error) bool { return err == nil }, "c2": func(err error) bool { return err == nil },
		"x/c4": func(err error) bool { return err == nil }, "k8s.io/1/c1": func(err error) bool { return err == nil },
		"c3": errdefs.IsFailedPrecondition, "c4": errdefs.IsNotFound, "1/c1": errdefs.IsNotFound, "": errdefs.IsNotFound, p.top(): errdefs.IsNotFound,
	} {
		if c, mode, err := g.Lookup(t.Context(), container); !want(err) || err == nil && mode != Share {
			t.Errorf("%q: %+v, %s, %v", container, c, mode, err)
		}
	}
}

// A broken message is an error for the one who sent it.
func TestEmptyUpdate(t *testing.T) {
	g := newRig(t, Full)
	_, err := service{}.Update(t.Context(), &snapshotsapi.UpdateSnapshotRequest{})
	if status.Code(err) != codes.InvalidArgument {
		t.Error(err)
	}
	client := listen(t, func(s *grpc.Server) { g.Register(s) })
	if _, err := client.Update(t.Context(), snapshots.Info{}); !errdefs.IsNotFound(err) && !errdefs.IsInvalidArgument(err) {
		t.Error(err)
	}
}

func TestClose(t *testing.T) {
	g := newRig(t, Full)
	must(g.Prepare(t.Context(), "c", ""))(t)
	for range 2 {
		if err := g.Close(); err != nil {
			t.Error(err)
		}
	}
	if _, err := g.Stat(t.Context(), "c"); err == nil {
		t.Error("a closed snapshotter answers")
	}
}

// What is written as labels is read again; other text is an error.
func FuzzRecord(f *testing.F) {
	d := "sha256:" + strings.Repeat("0a", 32)
	f.Add("r", d, "3/7", "guest", "why", "tatami.x")
	f.Add("", "", "", "", "", "")
	f.Add("r", "sha256:..", "0/0", "x", "", "")
	f.Add("r", d, "1/1/1", "", "", "")
	f.Fuzz(func(t *testing.T, ref, manifest, layers, mode, reason, holder string) {
		r, err := readRecord(map[string]string{labelReference: ref, labelManifest: manifest, labelLayers: layers,
			labelMode: mode, labelReason: reason, labelHolder: holder})
		if err != nil {
			return
		}
		client := map[string]string{"a": "b"}
		labels := r.addTo(client)
		back, err := readRecord(labels)
		if err != nil || back != r || !maps.Equal(visible(labels), client) {
			t.Fatalf("%+v, %v, from %+v by %v", back, err, r, labels)
		}
	})
}
